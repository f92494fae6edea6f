"""Files: records, configuration, models and encoders, tokenizers, indexes."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import merging
import numpy as np
import sentencepiece_like
import tiny
import yaml
from corpora import encyclopedia
from test_readers import SAMPLES

from r3rag_jax.config import load_config
from r3rag_jax.config.loader import to_yaml
from r3rag_jax.config.schema import schema
from r3rag_jax.data.questions import passage_to_dict, question_to_dict, read_passages, read_questions
from r3rag_jax.data.readers.flashrag import question_from_dict
from r3rag_jax.data.records import OnError
from r3rag_jax.data.trajectories import read_trajectories, trajectory_to_dict
from r3rag_jax.errors import UserError
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.encoder import BertConfig
from r3rag_jax.models.hf.decoder_files import (
    check_decoder,
    hf_tensors,
    load_generation,
    save_decoder,
)
from r3rag_jax.models.hf.decoder_files import (
    load_config as load_model_config,
)
from r3rag_jax.models.hf.tensor_files import TensorFiles, read_config
from r3rag_jax.models.paths import reading
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.encoders.sentence_transformers import read_max_length, read_pooling, read_prefix
from r3rag_jax.retrieval.fingerprint import digest
from r3rag_jax.retrieval.manifest import MANIFEST_FILE, check_files, read_manifest, write_manifest
from r3rag_jax.retrieval.store import PassageStore, open_store, write_store
from r3rag_jax.retrieval.vectors import VectorShards, write_shard
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Passage
from tests.fuzz import mutate
from tests.fuzz.target import READ, REFUSED, Run, ensure, refused

SKIP = OnError("skip", say=lambda text: None)
CORPUS = {"p1": Passage("p1", '"One"\nfirst'), "p2": Passage("p2", '"Two"\nsecond')}
TRAJECTORY = {
    "id": "q0", "question": "Who?", "golden_answers": ["He"], "metadata": {"type": "bridge", "supporting_ids": ["p1"]},
    "sample_index": 0,
    "steps": [
        {"analysis": "I need it.", "query": "who", "retrieved_ids": ["p1", "p2"], "passage_ids": ["p2"]},
        {"analysis": "More.", "query": "what", "passages": [{"id": "x", "contents": '"T"\ntext'}]},
        {"analysis": "So.", "answer": "He"},
    ],
}  # fmt: skip
PASSAGE_ROWS = ({"id": "a", "contents": '"T"\ntext'}, {"_id": 7, "title": "T", "text": "x"}, {"id": "b", "text": "y"})


# -------------------------------------------------------------------------------------- records


def _file_of(rows: list[Any], rng: random.Random) -> bytes:
    """Rows as JSON Lines, an array, a wrapped array or a table, compressed or not."""
    texts = [mutate.json_text(row, rng) for row in rows]
    form = rng.randrange(6)
    if form < 3:
        data = "".join(text + "\n" for text in texts)
    elif form == 3:
        data = f"[{', '.join(texts)}]"
    elif form == 4:
        data = f'{{"Version": 1, "Data": [{",".join(texts)}]}}'
    else:
        names = [name for name in rows[0] if name.isidentifier()] if isinstance(rows[0], dict) else ["a", "b"]
        cells = [[str(row.get(name, "")) for name in names] for row in rows if isinstance(row, dict)]
        data = "\n".join("\t".join(line) for line in [names, *cells])
    content = mutate.maybe_damaged(data.encode("utf-8", "surrogatepass"), rng, 0.15)
    if rng.random() < 0.1:
        compress = rng.choice((gzip.compress, bz2.compress, lzma.compress))
        content = mutate.maybe_damaged(compress(content), rng, 0.5)
    return content


def _records(directory: Path, draw: Callable[[random.Random], list[Any]], read: Callable[..., Any], check: Any) -> Run:
    """A target that writes rows to a file and reads them twice: strictly, and leaving out what is wrong."""
    path = directory / "rows.jsonl"

    def run(rng: random.Random) -> str:
        path.write_bytes(_file_of(draw(rng), rng))
        name = rng.choice(("", "nq:", "hotpotqa:", "triviaqa:")) if read is read_questions else ""
        try:
            found = read(f"{name}{path}")
        except UserError as error:
            refused(error, str(path), "data set")
            found = None
        try:
            kept = read(f"{name}{path}", SKIP)
        except UserError as error:
            refused(error, str(path), "data set")
            ensure(found is None, "read strictly, and refused leniently")
            return REFUSED
        ensure(found is None or found == kept, "records are left out that break no rule")
        for item in kept:
            check(item)
        return READ if found is not None else REFUSED

    return run


def open_questions(directory: Path) -> Run:
    """Questions in every layout; each that is read is written and read back."""
    rows = [row for _, row, _ in SAMPLES.values()]

    def check(question: Any) -> None:
        ensure(question.golden_answers and question.question.strip() and question.id.strip(), question)
        json.dumps(question_to_dict(question)).encode()
        ensure(question_from_dict(question_to_dict(question)) == question or _holds_nan(question), question)

    draw = lambda rng: [mutate.changed(rng.choice(rows), rng, 3) for _ in range(rng.randrange(1, 4))]  # noqa: E731
    return _records(directory, draw, read_questions, check)


def _holds_nan(item: Any) -> bool:
    return "NaN" in json.dumps(question_to_dict(item))


def open_passages(directory: Path) -> Run:
    """Passages; each that is read has text and an id."""

    def check(passage: Passage) -> None:
        ensure(passage.id.strip() and passage.contents.strip(), passage)
        (passage.id + passage.contents).encode()

    draw = lambda rng: [mutate.changed(rng.choice(PASSAGE_ROWS), rng) for _ in range(rng.randrange(1, 5))]  # noqa: E731
    return _records(directory, draw, read_passages, check)


def open_trajectories(directory: Path) -> Run:
    """A teacher's trajectories; each that is read is written and read back."""
    path = directory / "again.jsonl"

    def read(source: str, on_error: OnError = OnError()) -> Any:  # noqa: B008
        return read_trajectories(source, CORPUS, 2, on_error)

    def check(trajectory: Any) -> None:
        ensure([step.answer is not None for step in trajectory.steps][-1], trajectory)
        row = trajectory_to_dict(trajectory)
        path.write_text(json.dumps(row), encoding="utf-8")
        [again] = read_trajectories(path, CORPUS, 99)
        ensure(trajectory_to_dict(again) == row or "NaN" in json.dumps(row), row)

    draw = lambda rng: [mutate.changed(TRAJECTORY, rng, 3) for _ in range(rng.randrange(1, 3))]  # noqa: E731
    return _records(directory, draw, read, check)


# -------------------------------------------------------------------------------- configuration


def open_config(directory: Path) -> Run:
    """YAML and overrides; a configuration that is read is written and read back."""
    path, again = directory / "recipe.yaml", directory / "again.yaml"
    root = Path(__file__).resolve().parents[2]
    trees = [yaml.safe_load(file.read_text()) for file in sorted((root / "configs").glob("*.yaml"))]
    keys = sorted(schema())
    values = ("1", "0", "-1", "1e-3", "true", "no", "[a, b]", "1,2", "x", "'1'", "", ".inf", "9" * 30, '"\\U00110000"')

    def run(rng: random.Random) -> str:
        tree = mutate.changed(rng.choice(trees), rng, 3)
        for _ in range(rng.randrange(3)):
            if isinstance(tree, dict):
                tree[rng.choice(keys)] = rng.choice((mutate.value(rng), rng.choice((0, 1, 2, 0.5, "x", True))))
        data = yaml.safe_dump(tree, allow_unicode=True) if rng.random() < 0.7 else json.dumps(tree)
        if rng.random() < 0.1:
            data += rng.choice(
                ("name: &a [*a]\n", "x: !!python/object/apply:os.system [ls]\n", "? [a]\n: b\n", *values)
            )
        path.write_bytes(mutate.maybe_damaged(data.encode("utf-8", "surrogatepass"), rng, 0.2))
        words = [f"{rng.choice((rng.choice(keys), mutate.text(rng, 2)))}={rng.choice((*values, mutate.text(rng, 3)))}"]
        try:
            config = load_config(path, words if rng.random() < 0.3 else [])
        except UserError as error:
            return refused(error)
        again.write_text(to_yaml(config), encoding="utf-8")
        ensure(load_config(again) == config, "what is written is another configuration")
        return READ

    return run


# ------------------------------------------------------------------------- models and tokenizers


def open_model_configs(directory: Path) -> Run:
    """`config.json` of decoders and encoders; a decoder's is written and read back."""
    fixtures = sorted((Path(__file__).resolve().parents[1] / "fixtures").glob("*.json"))
    decoders = [json.loads(path.read_text()) for path in fixtures] + [tiny.decoder_config()]
    bert = {
        "model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 32, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    }  # fmt: skip
    file = directory / "config.json"

    def run(rng: random.Random) -> str:
        is_bert = rng.random() < 0.3
        tree = mutate.changed(bert if is_bert else rng.choice(decoders), rng, 3)
        file.write_bytes(mutate.maybe_damaged(mutate.json_text(tree, rng).encode("utf-8", "surrogatepass"), rng, 0.1))
        try:
            with reading(directory):
                if is_bert:
                    read_config(directory, BertConfig.from_hf)
                    return READ
                config = load_model_config(directory)
        except UserError as error:
            return refused(error, str(directory))
        ensure(DecoderConfig.from_hf(config.to_hf()) == config, config)
        return READ

    return run


def open_weights(directory: Path) -> Run:
    """safetensors files and their index: what is accepted has the names, shapes and bytes that were written."""
    save_decoder(tiny.decoder(vocab_size=40), directory, dtype="float32")
    with np.errstate(all="ignore"):
        config = load_model_config(directory)
    weights, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, name = json.loads(content[8:start]), "model.norm.weight"
    names = [one for one in header if one != "__metadata__"]
    expected = content[start:]

    def damaged_file(rng: random.Random) -> bytes:
        draw = rng.random()
        if draw < 0.3:
            return mutate.damaged(content, rng)
        if draw < 0.5:
            size = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(content), start))
            return size.to_bytes(8, "little") + content[8:]
        text = mutate.json_text(mutate.changed(header, rng, 3), rng).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + content[start:]

    def run(rng: random.Random) -> str:
        index.unlink(missing_ok=True)
        if rng.random() < 0.2:
            weights.write_bytes(content)
            tree = mutate.changed({"metadata": {}, "weight_map": dict.fromkeys(names, weights.name)}, rng, 3)
            index.write_bytes(mutate.json_text(tree, rng).encode("utf-8", "surrogatepass"))
        else:
            weights.write_bytes(damaged_file(rng))
        try:
            with reading(directory), TensorFiles(directory) as files:
                check_decoder(config, files)
                arrays = {one: files.read(one, ()) for one in hf_tensors(config)}
        except UserError as error:
            return refused(error, str(directory))
        ensure(all(arrays[one].shape == tensor.shape for one, tensor in hf_tensors(config).items()), name)
        if weights.read_bytes() == content:
            first, last = header[name]["data_offsets"]
            ensure(arrays[name].tobytes() == expected[first:last], "other bytes are read than the header says")
        return READ

    return run


def _with_files(directory: Path, files: Mapping[str, bytes], rng: random.Random, text_of: Mapping[str, Any]) -> None:
    """Write files, one or two of them with a changed tree or damaged bytes."""
    broken = rng.sample(sorted(files), rng.randrange(1, 3))
    for name, content in files.items():
        if name in broken:
            tree = mutate.changed(text_of[name], rng, 3)
            content = mutate.json_text(tree, rng).encode("utf-8", "surrogatepass")
            content = mutate.maybe_damaged(content, rng, 0.2)
        (directory / name).write_bytes(content)


def open_tokenizers(directory: Path) -> Run:
    """tokenizer.json and the files beside it: a tokenizer that encodes, frames and ends texts, or an error."""
    added = {
        "additional_special_tokens": ["<x>"], "bos_token": {"content": "<|endoftext|>", "lstrip": False},
        "added_tokens_decoder": {"300": {"content": "<y>", "special": True}}, "extra_special_tokens": {"a": "<z>"},
    }  # fmt: skip
    trees = {
        "tokenizer.json": _small_tokenizer(directory),
        "tokenizer_config.json": json.loads((directory / "tokenizer_config.json").read_text()) | added,
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "unk_token": {"content": "<x>"}},
        "generation_config.json": {"eos_token_id": [0, 1]},
    }
    return _tokenizers(directory, [trees])


def open_tokenizer_kinds(directory: Path) -> Run:
    """The same of other kinds: with a space before a text, and with the published pre-tokenizers."""
    kinds = []
    for name, write in (
        ("prepend", sentencepiece_like.write), ("first", sentencepiece_like.write), ("qwen2", merging.tokenizer),
        ("smollm2", merging.tokenizer),
    ):  # fmt: skip
        write(directory / name, name)
        names = ("tokenizer.json", "tokenizer_config.json")
        kinds.append({one: json.loads((directory / name / one).read_text()) for one in names})
    return _tokenizers(directory, kinds)


def _small_tokenizer(directory: Path) -> Any:
    tiny.tokenizer(directory)
    tree = json.loads((directory / "tokenizer.json").read_text())
    tree["model"]["vocab"] = dict(list(tree["model"]["vocab"].items())[:60])
    return tree


def _tokenizers(directory: Path, kinds: list[dict[str, Any]]) -> Run:
    files = [{name: json.dumps(tree).encode() for name, tree in trees.items()} for trees in kinds]

    def run(rng: random.Random) -> str:
        kind = rng.randrange(len(kinds))
        _with_files(directory, files[kind], rng, kinds[kind])
        try:
            with reading(directory):
                load_generation(directory)
                tokenizer = Tokenizer(directory)
                tokenizer.check_special_tokens()
                codec = Codec(tokenizer, make_protocol(rng.choice(("steps", "search_r1"))), 8)
                text = mutate.text(rng)
                ids = codec.prompt_ids(text)
                _ = tokenizer.end_ids, codec.shown(Passage("p", text or "x")), tokenizer.decode(ids)
        except UserError as error:
            return refused(error, str(directory))
        ensure(all(0 <= id < tokenizer.vocab_size for id in ids), ids)
        return READ

    return run


def open_encoder_files(directory: Path) -> Run:
    """The files of sentence-transformers and the encoder of an index."""
    (directory / "1_Pooling").mkdir(exist_ok=True)
    HashEncoder(dim=64).fit(passage.contents for passage in encyclopedia()[:9]).save(directory)
    content = (directory / "encoder.npz").read_bytes()
    trees: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
        "sentence_bert_config.json": {"max_seq_length": 32},
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": None},
    }
    files = {name: json.dumps(tree).encode() for name, tree in trees.items()}

    def run(rng: random.Random) -> str:
        try:
            if rng.random() < 0.4:
                path = directory / "encoder.npz"
                path.write_bytes(mutate.damaged(content, rng))
                encoder = HashEncoder.load(path)
                ensure(encoder.encode(["film"]).shape == (1, encoder.dim), "another shape")
                return READ
            _with_files(directory, files, rng, trees)
            with reading(directory):
                length = read_max_length(directory, 0, 64)
                pooling, prefix = read_pooling(directory, "auto"), read_prefix(directory, "auto", "query")
        except UserError as error:
            return refused(error, str(directory))
        ensure(1 <= length <= 64 and pooling in ("mean", "cls") and isinstance(prefix, str), (length, pooling))
        return READ

    return run


# ---------------------------------------------------------------------------------------- indexes


def open_indexes(directory: Path) -> Run:
    """The files of an index, with digests that fit or not: the passages that were written, or an error."""
    passages = encyclopedia()[:12]
    write_store(directory, passages)
    vectors = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    write_shard(directory, 0, vectors[:8])
    write_shard(directory, 1, vectors[8:])
    write_manifest(directory, "faiss", 12, digest(["x"]), {"encoder": "y"}, {"top_k": 3})
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    tree = json.loads(files[MANIFEST_FILE])

    def run(rng: random.Random) -> str:
        for name, content in files.items():
            (directory / name).write_bytes(content)
        name, fits = rng.choice(sorted(files)), rng.random() < 0.5
        content = mutate.damaged(files[name], rng)
        if name == MANIFEST_FILE:
            content = mutate.json_text(mutate.changed(tree, rng, 3), rng).encode("utf-8", "surrogatepass")
            content = mutate.maybe_damaged(content, rng, 0.2)
        (directory / name).write_bytes(content)
        is_same = content == files[name]
        try:
            if fits and name != MANIFEST_FILE:  # as if somebody had written the digests, too
                store, shards = PassageStore(directory), VectorShards.open(directory)
            else:
                manifest = read_manifest(directory)
                check_files(directory, manifest, manifest.files)
                store, shards = open_store(directory), VectorShards.open(directory)
            found = list(store.passages())
            rows = shards.rows(0, len(shards))
        except UserError as error:
            return refused(error, str(directory))
        ensure(fits or name == MANIFEST_FILE or is_same, "a damaged file is not noticed")
        if is_same:
            ensure(found == passages and np.array_equal(rows, vectors), "another index is read")
        ensure(all(passage_to_dict(passage) for passage in found), found)
        return READ

    return run
