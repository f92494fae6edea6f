"""The BERT model against transformers: hidden states, pooling, checkpoints and configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bert_files import SIZES, VOCAB, assert_near, cosines, edit, hf_model, hf_states, write_model
from safetensors.numpy import load_file, save_file

from r3rag_jax.models.encoder import BertConfig, load_encoder, param_shapes, pool, unit

LENGTHS = np.array([23, 1, 40, 9])
TOKENS = np.random.default_rng(0).integers(5, len(VOCAB), size=(4, 40))


def padded(keep: np.ndarray) -> np.ndarray:
    """TOKENS of each row at the places kept, noise elsewhere."""
    tokens = np.random.default_rng(1).integers(0, len(VOCAB), size=keep.shape)
    for row, length in enumerate(LENGTHS):
        tokens[row, keep[row]] = TOKENS[row, :length]
    return tokens


def places(kind: str) -> np.ndarray:
    """bool [4, 48]: where each row keeps its tokens."""
    columns = np.arange(48)
    if kind == "right":
        return columns < LENGTHS[:, None]
    if kind == "left":
        return columns >= 48 - LENGTHS[:, None]
    rng = np.random.default_rng(2)
    return np.stack([np.isin(columns, rng.choice(48, size=length, replace=False)) for length in LENGTHS])


@pytest.mark.parametrize("kind", ["right", "left", "ragged"])
def test_hidden_states_are_those_of_transformers_wherever_the_padding_lies(built: Path, kind: str) -> None:
    theirs, ours = hf_model(built), load_encoder(built)
    keep = places(kind)
    states = np.asarray(ours(jnp.asarray(padded(keep)), jnp.asarray(keep)))
    assert np.isfinite(states).all()
    for row, length in enumerate(LENGTHS):
        assert_near(states[row, keep[row]], hf_states(theirs, TOKENS[row : row + 1, :length])[0])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_do_not_depend_on_the_padding(built: Path, pooling: str) -> None:
    model = load_encoder(built)
    embed = jax.jit(lambda tokens, keep: unit(pool(model(tokens, keep), keep, pooling)))
    right, left, ragged = (np.asarray(embed(padded(keep), keep)) for keep in map(places, ("right", "left", "ragged")))
    np.testing.assert_allclose(left, right, atol=2e-6)
    np.testing.assert_allclose(ragged, right, atol=2e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 1, "num_hidden_layers": 1},
        {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 20, "layer_norm_eps": 1e-2},
        {"type_vocab_size": 1, "max_position_embeddings": 40},
    ],
    ids=str,
)
def test_other_sizes_match_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_model(tmp_path, **changes)
    ours = load_encoder(tmp_path)(jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool))
    assert_near(np.asarray(ours), hf_states(hf_model(tmp_path), TOKENS))


def test_bfloat16_stays_near(built: Path) -> None:
    keep = places("right")
    exact, rounded = (
        np.asarray(unit(pool(load_encoder(built, dtype=dtype)(padded(keep), keep), keep, "mean")))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == np.float32
    assert cosines(rounded, exact).min() > 0.999


def test_pooling_by_hand() -> None:
    hidden = jnp.asarray([[[9.0, 9], [3, 4], [1, 0]], [[1, 2], [3, 4], [5, 6]]])
    mask = jnp.asarray([[False, True, True], [False, False, False]])
    np.testing.assert_allclose(pool(hidden, mask, "mean"), [[2, 2], [0, 0]])
    np.testing.assert_allclose(pool(hidden, mask, "cls"), [[3, 4], [0, 0]])
    np.testing.assert_allclose(unit(pool(hidden, mask, "cls")), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"pooling must be one of .*got 'max'"):
        pool(hidden, mask, "max")


def test_a_model_with_a_head_is_read_without_it(built: Path, tmp_path: Path) -> None:
    write_model(tmp_path, prefix="bert.")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"cls.predictions.bias": np.zeros(len(VOCAB))}, tmp_path / "model.safetensors")
    keep = jnp.ones(TOKENS.shape, bool)
    want, got = (load_encoder(path)(jnp.asarray(TOKENS), keep) for path in (built, tmp_path))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_norms_of_older_exports_are_read(built: Path, tmp_path: Path, prefix: str) -> None:
    """Checkpoints converted from TensorFlow say LayerNorm.gamma and .beta, bert-base-uncased among them."""
    write_model(tmp_path, prefix=prefix)
    weights, new, old = tmp_path / "model.safetensors", ("weight", "bias"), ("gamma", "beta")
    tensors = load_file(weights)
    for one, other in zip(new, old, strict=True):
        tensors = {name.replace(f"LayerNorm.{one}", f"LayerNorm.{other}"): x for name, x in tensors.items()}
    assert f"{prefix}embeddings.LayerNorm.gamma" in tensors
    save_file(tensors, weights)
    keep = jnp.ones(TOKENS.shape, bool)
    want, got = (load_encoder(path)(jnp.asarray(TOKENS), keep) for path in (built, tmp_path))
    np.testing.assert_array_equal(got, want)
    name = f"{prefix}encoder.layer.1.output.LayerNorm.beta"
    save_file({key: x for key, x in tensors.items() if key != name}, weights)
    with pytest.raises(ValueError, match=rf"missing: {name} of shape \(32,\)$"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("layers", "width", "ffn", "heads", "num_params"),
    [(12, 768, 3072, 12, 108_891_648), (24, 1024, 4096, 16, 334_092_288), (6, 384, 1536, 12, 22_565_376)],
    ids=["e5-base-v2", "bge-large-en-v1.5", "all-MiniLM-L6-v2"],
)
def test_real_encoders_have_their_published_sizes(
    layers: int, width: int, ffn: int, heads: int, num_params: int
) -> None:
    """Without the pooler, which has width * (width + 1) more."""
    hf = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30_522, "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": ffn, "hidden_act": "gelu",
        "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "use_cache": True, "classifier_dropout": None,
    }  # fmt: skip
    shapes = param_shapes(BertConfig.from_hf(hf)).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == num_params


def test_buffers_and_pooler_are_ignored_and_what_else_differs_is_named(directory: Path) -> None:
    weights, name = directory / "model.safetensors", "encoder.layer.2.output.dense.weight"
    tensors = load_file(weights)
    assert "pooler.dense.weight" in tensors
    save_file(tensors | {"embeddings.position_ids": np.arange(80)[None]}, weights)
    load_encoder(directory)
    save_file(tensors | {"extra.weight": np.zeros(2)}, weights)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*bert with 3 layers; unexpected: extra\.weight$"):
        load_encoder(directory)
    save_file(tensors | {name: tensors[name][:, :-1].copy()}, weights)
    with pytest.raises(
        ValueError, match=r"layer\.2\.output\.dense\.weight must have shape \(32, 48\) .*got \(32, 47\)"
    ):
        load_encoder(directory)
    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.2\.output\.dense\.weight of shape \(32, 48\)$"):
        load_encoder(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type must be 'bert'; got 'roberta'"),
        ({"hidden_act": "gelu_new"}, "hidden_act must be 'gelu'; got 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'; got 'relative_key'"),
        ({"is_decoder": True}, "is_decoder must be False; got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False; got True"),
        ({"max_position_embeddings": None}, "must hold 'max_position_embeddings'"),
        ({"num_attention_heads": 5}, "hidden_size must be divisible by num_heads 5; got 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1 to 1024; got 0"),
    ],
)
def test_unsupported_configs_are_refused_by_name(directory: Path, change: dict[str, Any], message: str) -> None:
    edit(directory / "config.json", **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(directory)
    assert str(directory / "config.json") in str(caught.value)


def test_a_config_that_is_silent_takes_the_defaults_of_transformers() -> None:
    config = BertConfig.from_hf({**SIZES, "model_type": "bert"})
    theirs = pytest.importorskip("transformers").BertConfig()
    assert (config.num_types, config.norm_eps) == (theirs.type_vocab_size, theirs.layer_norm_eps)
