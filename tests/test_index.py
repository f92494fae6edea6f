"""The entry point that builds an index, and runs that share one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tiny_run
from rich.console import Console

from r3rag_jax import index
from r3rag_jax.components import Components
from r3rag_jax.config import RetrievalConfig
from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.errors import UserError
from r3rag_jax.experiment import PHASES
from r3rag_jax.retrieval.factory import open_retriever, open_store
from r3rag_jax.run.directory import open_run
from r3rag_jax.world import dataset


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": i, "contents": f'"Door {i}"\nIt is green.'}) + "\n" for i in range(9)))
    return path


def test_an_index_is_built_from_a_file(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shared" / "doors"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("retrieval: {top_k: 3}\nretrieval.encoder.dim: 32\nphases: [rl]\n")
    build = ["build", "--corpus", str(corpus), "--out", str(out), "--config", str(recipe)]
    assert index.main([*build, "retrieval.encoder.dim=64"]) == 0
    assert f"{out}: 9 passages, faiss, corpus " in capsys.readouterr().out
    config = RetrievalConfig(encoder={"kind": "hash", "dim": 64})
    [hits] = open_retriever(config, out).search(["Door 7"], 1)
    assert hits[0].passage.id == "7"
    assert index.main(build) == 0  # an index may be replaced
    with pytest.raises(UserError, match=r"retrieval\.encoder\.dim must be 32"):
        open_retriever(config, out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=3"], "only keys of section retrieval and data.on_error describe an index; got 'seed=3'"),
        (["retrieval.encoder.dimm=3"], "did you mean 'retrieval.encoder.dim'"),
        (["--corpus", "nothing.jsonl"], "nothing.jsonl: expected a readable file of records"),
        (["--out", "."], "--out must be a new or empty directory, or an index to replace; got ."),
    ],
)
def test_what_cannot_be_built_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    try:
        status = index.main(["build", "--corpus", str(corpus), "--out", str(tmp_path / "index"), *words])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "index").exists()


def test_flags_are_keys_and_an_index_knows_what_it_was_built_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for start, part in zip((0, 30), parts, strict=True):
        write_jsonl(
            part, ({"id": str(i), "contents": f'"Door {i}"\nDoor {i} is green.'} for i in range(start, start + 30))
        )
    questions = tmp_path / "questions.jsonl"
    hops = [{"sub_question": "Which colour has door 9?", "passage_id": "9"}]
    metadata = {"supporting_ids": ["31", "9"], "decomposition": hops}
    write_jsonl(questions, [{"id": "1", "question": "door 31, door 9", "golden_answers": ["x"], "metadata": metadata}])
    out = tmp_path / "i"
    build = ["build", "--kind", "hnsw", "--memory", "1", "--out", str(out), "--corpus", *map(str, parts)]
    assert index.main([*build, "retrieval.encoder.dim=64"]) == 0  # a key is no file of the list before it
    said = capsys.readouterr().out
    assert "recall@10 against exact search, first lines of 60 passages as queries: 1.000" in said
    assert "60 vectors of 64 float16, hnsw, 32 links" in said and f"{out}: 60 passages, faiss, corpus" in said
    assert index.main(["eval", "--index", str(out), "--questions", str(questions), "-k", "2"]) == 0
    said = capsys.readouterr().out
    assert "supporting" in said and "exact search" in said and "1.000" in said and "decomposed" in said
    assert index.main(["check", "--index", str(out)]) == 0
    assert "files are as they were built" in capsys.readouterr().out
    assert index.main(["plan", "--passages", "21000000", "--dim", "768", "--kind", "ivfpq", "--memory", "8"]) == 0
    assert "21000000 vectors of 768 float16, ivfpq, 16384 lists" in capsys.readouterr().out
    assert index.main(["eval", "--index", str(out)]) == 2
    assert "eval needs --questions FILE or --trajectories FILE; got neither" in capsys.readouterr().err


def test_check_reads_every_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "corpus.jsonl"
    write_jsonl(corpus, [{"id": str(i), "contents": "x" * 100_000} for i in range(60)])  # 6 MB: samples are read
    out = tmp_path / "i"
    assert index.main(["build", "--corpus", str(corpus), "--kind", "bm25", "--out", str(out)]) == 0
    data = bytearray((out / "passages.jsonl").read_bytes())
    data[300_000] = ord("y")  # between two samples
    (out / "passages.jsonl").write_bytes(data)
    open_store(out)
    assert index.main(["check", "--index", str(out)]) == 2
    assert "passages.jsonl must be the file that was built" in capsys.readouterr().err
    (out / "passages.jsonl").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"passages\.jsonl must be the file that was built, of \d+ bytes; got \d+"):
        open_store(out)


def test_two_runs_share_an_index_and_one_of_another_corpus_is_refused(base: Path, tmp_path: Path) -> None:
    def open_components(name: str, **settings: object) -> Components:
        config = tiny_run.config(tmp_path / name, base, retrieval__index_dir=tmp_path / "shared", **settings)
        return Components(config, open_run(config), Console(file=io.StringIO()))

    one, two = open_components("one"), open_components("two")
    assert PHASES["index"](one)
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()}
    assert PHASES["index"](two)  # its data files
    assert not PHASES["index"](one) and not PHASES["index"](two)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()} == built
    assert not one.run.index.exists() and not two.run.index.exists()
    assert one.run.data("sft").read_bytes() == two.run.data("sft").read_bytes()
    assert one.retriever.fingerprint == two.retriever.fingerprint
    assert len(one.dataset.trajectories()) == one.config.world.num_sft
    assert len(open_store(tmp_path / "shared")) > 100
    with pytest.raises(UserError, match=r"what was indexed: the index in .*shared is of passages .*corpus\.jsonl"):
        PHASES["index"](open_components("three", world__seed=7))


def test_a_phase_that_was_interrupted_is_completed(base: Path, tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, base)
    components = Components(config, open_run(config), Console(file=io.StringIO()))
    assert PHASES["index"](components)
    sft = components.run.data("sft").read_bytes()
    components.run.data("sft").unlink()  # as after an interruption behind the index
    assert PHASES["index"](components)
    assert components.run.data("sft").read_bytes() == sft
    assert not PHASES["index"](components)


def test_a_corpus_that_has_changed_since_is_noticed_and_one_that_has_not_is_not_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "mine.jsonl"
    rows = [{"id": str(i), "contents": f'"Hut {i}"\nHut {i} stands on hill {i}.'} for i in range(3)]
    write_jsonl(corpus, rows)
    settings = {"data__source": "files", "data__corpus": corpus, "phases": "index"}
    config = tiny_run.config(tmp_path, base, **settings)
    components = Components(config, open_run(config), Console(file=io.StringIO()))
    index_phase = PHASES["index"]
    assert index_phase(components)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "corpus_fingerprint", None)  # would be called to read the file
        assert not index_phase(components)
    write_jsonl(corpus, rows)  # the same passages, written later
    assert not index_phase(components)
    write_jsonl(corpus, [*rows[:2], {"id": "2", "contents": '"Hut 2"\nHut 2 stands on hill 9.'}])
    before = tiny_run.files(tmp_path / "run" / "index")
    words = r"data\.corpus must be what was indexed: .*/run/index .*; got .*mine\.jsonl .* choose another name="
    with pytest.raises(UserError, match=words):
        index_phase(components)
    assert tiny_run.files(tmp_path / "run" / "index") == before
    corpus.unlink()  # the index holds the passages
    assert not index_phase(components)
