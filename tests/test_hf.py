import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from r3rag_jax.models.config import DecoderConfig, RopeScaling
from r3rag_jax.models.decoder import PARAM_AXES, Decoder, param_shapes
from r3rag_jax.models.hf import load_config, load_decoder, save_decoder

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_config(model_type: str):
    """Tiny configs: untied with llama3 RoPE; tied; one whose N * H is not D."""
    if model_type == "llama":
        return transformers.LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3))
    if model_type == "qwen2":
        return transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    return transformers.Qwen3Config(**SIZES, head_dim=12)


def hf_model(model_type: str):
    """A random model in which no norm is one and no bias is zero."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(hf_config(model_type)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0)
    return model


def hf_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def our_logits(model: Decoder, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(model.logits(model(jnp.asarray(tokens), positions)))


def assert_near(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


TOKENS = np.random.default_rng(0).integers(0, 97, size=(2, 100))


@pytest.fixture
def llama_dir(tmp_path):
    hf_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_same_logits_as_transformers_and_back(model_type, tmp_path):
    theirs = hf_model(model_type)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_decoder(tmp_path / "in", dtype=jnp.float32)
    want = hf_logits(theirs, TOKENS)
    assert_near(our_logits(ours, TOKENS), want)

    save_decoder(ours, tmp_path / "out", dtype="float32")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(back) is type(theirs)
    np.testing.assert_allclose(hf_logits(back.eval(), TOKENS), want, rtol=1e-6, atol=1e-6)
    before, after = (
        load_file(tmp_path / "in/model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


def test_hidden_states_match(tmp_path):
    theirs = hf_model("qwen3")
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        want = theirs.model(torch.as_tensor(TOKENS)).last_hidden_state.numpy()
    ours = load_decoder(tmp_path, dtype=jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    assert_near(np.asarray(ours(jnp.asarray(TOKENS), positions)), want)


def test_bfloat16_export_is_what_transformers_reads(llama_dir, tmp_path):
    ours = load_decoder(llama_dir, dtype=jnp.float32)
    save_decoder(ours, tmp_path / "half")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert theirs.dtype == torch.bfloat16
    half = load_decoder(tmp_path / "half", dtype=jnp.float32, param_dtype=jnp.bfloat16)
    assert half.embed[...].dtype == jnp.bfloat16
    q_proj = theirs.model.layers[1].self_attn.q_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(half.layers.q_proj[...][1].astype(jnp.float32), q_proj.T)
    np.testing.assert_array_equal(half.layers.q_proj[...], ours.layers.q_proj[...].astype(jnp.bfloat16))


def test_sharded_files_and_shardings(llama_dir, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama_dir)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def sharding(name: str) -> NamedSharding:
        axes = ("fsdp" if axis == "embed" else None for axis in PARAM_AXES[name])
        return NamedSharding(mesh, PartitionSpec(*axes))

    sharded = load_decoder(tmp_path / "shards", dtype=jnp.float32, shardings=sharding)
    assert sharded.param("q_proj")[...].sharding == sharding("q_proj")
    assert sharded.param("q_proj")[...].addressable_shards[0].data.shape == (2, 4, 32)
    whole = load_decoder(llama_dir, dtype=jnp.float32)
    for name in param_shapes(whole.config):
        np.testing.assert_array_equal(sharded.param(name)[...], whole.param(name)[...])
    save_decoder(sharded, tmp_path / "out", dtype="float32")
    again = load_file(tmp_path / "out/model.safetensors")
    for name, array in load_file(llama_dir / "model.safetensors").items():
        np.testing.assert_array_equal(again[name], array)


def rewrite(directory, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_missing_unexpected_and_misshapen_tensors_are_named(llama_dir):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(llama_dir, lambda t: t.update({"extra.weight": t[name]}))
    with pytest.raises(ValueError, match=r"model\.safetensors: .*unexpected: extra\.weight"):
        load_decoder(llama_dir, dtype=jnp.float32)
    rewrite(llama_dir, lambda t: (t.pop("extra.weight"), t.update({name: t[name][:-1].copy()})))
    with pytest.raises(ValueError, match=r"up_proj\.weight must have shape \(48, 32\).*\(47, 32\)"):
        load_decoder(llama_dir, dtype=jnp.float32)
    rewrite(llama_dir, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_decoder(llama_dir, dtype=jnp.float32)


def test_missing_and_broken_files_are_named(llama_dir):
    weights = llama_dir / "model.safetensors"
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is not a valid safetensors file"):
        load_decoder(llama_dir, dtype=jnp.float32)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or"):
        load_decoder(llama_dir, dtype=jnp.float32)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight and 19 more"):
        load_decoder(llama_dir, dtype=jnp.float32)
    (llama_dir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold config.json"):
        load_decoder(llama_dir, dtype=jnp.float32)


def test_a_shard_named_by_the_index_must_exist(llama_dir):
    names = load_file(llama_dir / "model.safetensors")
    (llama_dir / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "gone.safetensors")}
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names gone\.safetensors"):
        load_decoder(llama_dir, dtype=jnp.float32)


def test_export_refuses_other_dtypes(tmp_path):
    config = DecoderConfig.from_hf(hf_config("qwen2").to_dict())
    with pytest.raises(ValueError, match=r"dtype must be one of .*got 'float16'"):
        save_decoder(Decoder(config, rngs=nnx.Rngs(0)), tmp_path, dtype="float16")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_config_round_trip(model_type):
    config = DecoderConfig.from_hf(hf_config(model_type).to_dict())
    assert DecoderConfig.from_hf(config.to_hf()) == config
    assert config.head_dim == (12 if model_type == "qwen3" else 8)
    assert (config.attention_bias, config.qk_norm) == (model_type == "qwen2", model_type == "qwen3")


def test_both_spellings_of_rope_are_read():
    base = {**SIZES, "model_type": "llama"}
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = DecoderConfig.from_hf({**base, "rope_theta": 500_000.0, "rope_scaling": scaling})
    new = DecoderConfig.from_hf({**base, "rope_parameters": LLAMA3})
    assert old == new
    assert new.rope_theta == 500_000.0 and new.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    plain = DecoderConfig.from_hf({**base, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert plain.rope_theta == 1e6 and plain.rope_scaling is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type must be one of .*got 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'; got 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be .*got 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type must be .*got 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor'.* missing"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "got .'sliding_attention'"),
        ({"attention_bias": True}, "attention_bias must be false for model_type 'llama'"),
        ({"vocab_size": None}, "must hold 'vocab_size'"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message, tmp_path):
    config = {**SIZES, "model_type": "llama", **change}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
