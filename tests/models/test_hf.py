import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from safetensors.numpy import load_file, save_file

from r3rag_jax.models.config import DecoderConfig, RopeScaling
from r3rag_jax.models.decoder import PARAM_AXES, Decoder, param_shapes
from r3rag_jax.models.hf.decoder_files import load_config, load_decoder, load_generation, save_decoder
from r3rag_jax.models.hf.tensor_files import TensorFiles
from r3rag_jax.parallel.mesh import AXES
from r3rag_jax.parallel.shardings import partition_spec
from r3rag_jax.sampler.engine import Engine
from r3rag_jax.types import Context

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
LLAMA = {"model_type": "llama", **SIZES}
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
    return tiny.logits(model, tokens, positions)


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


@pytest.mark.parametrize(
    "model_type", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3"))]
)
def test_64_greedy_tokens_are_those_of_transformers(model_type, tmp_path):
    """Prompts of three lengths side by side in our sampler, one by one in theirs."""
    theirs = hf_model(model_type)
    theirs.generation_config.eos_token_id = None  # a random model may say it
    with torch.no_grad():
        theirs.model.embed_tokens.weight.mul_(0.25)  # tied to the output, it would repeat the last token
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path, dtype=jnp.float32)
    graphdef, params = nnx.split(ours)
    mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    engine = Engine(graphdef, ours.config, mesh, slots=4, max_length=160)
    policy = engine.load(params)
    prompts = [TOKENS[0, :length].tolist() for length in (3, 34, 90)]
    engine.set_context(policy, {row: Context(ids, budget=64) for row, ids in enumerate(prompts)})
    engine.decode(policy, max_tokens=64, leave_at=4)
    said = set()
    for row, ids in enumerate(prompts):
        tokens = torch.as_tensor([ids])
        mask = torch.ones_like(tokens)  # theirs would else take an id 0 in a prompt for padding
        spoken = theirs.generate(tokens, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
        assert engine.rows.tokens[row, : len(ids) + 64].tolist() == spoken[0].tolist()
        said |= set(spoken[0, len(ids) :].tolist())
    assert len(said) > 3  # not one token over and over


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


def mesh_shardings(*sizes: int):
    """Name -> sharding as training has it, over the given sizes of (data, fsdp, tensor)."""
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)

    def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(mesh, PARAM_AXES[name], shape))

    return {name: sharding(name, shape) for name, shape in param_shapes(DecoderConfig.from_hf(LLAMA)).items()}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_every_device_reads_its_slice_and_no_more(sizes, llama_dir, tmp_path, monkeypatch):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama_dir)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    whole = load_decoder(llama_dir, dtype=jnp.float32)
    shardings, read, num_read = mesh_shardings(*sizes), TensorFiles.read, []

    def count(files, name, index):
        array = read(files, name, index)
        num_read.append(array.size)
        return array

    monkeypatch.setattr(TensorFiles, "read", count)
    sharded = load_decoder(tmp_path / "shards", dtype=jnp.float32, shardings=shardings)
    total = sum(param.size for param in jax.tree.leaves(nnx.state(whole)))
    assert sum(num_read) == total  # each number once, though `data` holds it several times
    for name, shape in param_shapes(whole.config).items():
        array = sharded.param(name)[...]
        assert array.sharding == shardings[name]
        assert {part.data.shape for part in array.addressable_shards} == {shardings[name].shard_shape(shape)}
        np.testing.assert_array_equal(array, whole.param(name)[...])
    assert max(num_read) == max(
        int(np.prod(shardings[n].shard_shape(s)[-2:])) for n, s in param_shapes(whole.config).items()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_file_bytes", [1_000, 20_000, 10**9])
def test_import_and_export_keep_every_bit(dtype, max_file_bytes, llama_dir, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "in")
    ours = load_decoder(tmp_path / "in", dtype=dtype, shardings=mesh_shardings(2, 2, 2))
    out = tmp_path / "out"
    save_decoder(ours, out, dtype=dtype, max_file_bytes=max_file_bytes)
    want, got = load_file(tmp_path / "in" / "model.safetensors"), {}
    for file in sorted(out.glob("*.safetensors")):
        part = load_file(file)
        assert len(part) == 1 or sum(array.nbytes for array in part.values()) <= max_file_bytes
        got |= part
    assert want.keys() == got.keys()
    for name, array in want.items():
        assert array.dtype == got[name].dtype and array.tobytes() == got[name].tobytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    num_files = len(list(out.glob("*.safetensors")))
    assert (out / "model.safetensors.index.json").is_file() == (num_files > 1) == (max_file_bytes < 10**9)
    if num_files > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in want.values())
        files = {f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)}
        assert set(index["weight_map"].values()) == files


def test_weights_of_an_earlier_export_are_removed(llama_dir, tmp_path):
    """An index that is left over would be read instead of the new file."""
    ours, out = load_decoder(llama_dir, dtype=jnp.float32), tmp_path / "out"
    save_decoder(ours, out, dtype="float32", max_file_bytes=20_000)
    (out / "tokenizer.json").write_text("{}")
    save_decoder(ours, out, dtype="float32")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_what_generation_is_told(llama_dir, tmp_path):
    generation = {"eos_token_id": [5, 7], "pad_token_id": 5, "temperature": 0.6, "do_sample": True}
    save_decoder(load_decoder(llama_dir, dtype=jnp.float32), tmp_path / "out", generation=generation)
    assert load_generation(tmp_path / "out") == generation
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.generation_config.eos_token_id == [5, 7] and theirs.generation_config.temperature == 0.6
    assert theirs.config.eos_token_id == [5, 7] and theirs.config.pad_token_id == 5
    (tmp_path / "out" / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json must hold an object; got list"):
        load_generation(tmp_path / "out")
    assert load_generation(llama_dir / "nowhere") == {}


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
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight of shape \(48, 32\)$"):
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
    with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight of shape \(97, 32\) and 19 more"):
        load_decoder(llama_dir, dtype=jnp.float32)
    (llama_dir / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold config.json"):
        load_decoder(llama_dir, dtype=jnp.float32)


def test_what_a_truncated_file_lacks_is_named(llama_dir):
    weights = llama_dir / "model.safetensors"
    whole = weights.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    name = "model.layers.1.mlp.up_proj.weight"
    end = start + header[name]["data_offsets"][1]
    later = sum(start + entry["data_offsets"][1] > end for key, entry in header.items() if key != "__metadata__")
    weights.write_bytes(whole[: end - 4])
    message = rf"{name} of shape \(48, 32\) must end at byte {end} \(nor {later} more\); got {end - 4} bytes$"
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated: tensor " + message):
        load_decoder(llama_dir, dtype=jnp.float32)
    for size in (start - 9, 4, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
            load_decoder(llama_dir, dtype=jnp.float32)


def test_numbers_of_another_kind_are_refused(llama_dir):
    name = "model.norm.weight"
    rewrite(llama_dir, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight must hold one of \('BF16', .*\); got I8"):
        load_decoder(llama_dir, dtype=jnp.float32)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_must_map_tensors_to_files(text, llama_dir):
    (llama_dir / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json must hold .*weight_map.* got something else"):
        load_decoder(llama_dir, dtype=jnp.float32)


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "x.bin", ""])
def test_an_index_names_files_beside_it_alone(name, llama_dir):
    index = {"weight_map": {"model.norm.weight": name}}
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"with names of files beside it"):
        load_decoder(llama_dir, dtype=jnp.float32)


def test_an_index_may_not_promise_what_its_file_lacks(llama_dir):
    names = dict.fromkeys(load_file(llama_dir / "model.safetensors"), "model.safetensors")
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    load_decoder(llama_dir, dtype=jnp.float32)
    rewrite(llama_dir, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot read tensor model\.norm\.weight"):
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
        ({"vocab_size": "97"}, "vocab_size must be a whole number from 1 to 16777216; got '97'"),
        ({"hidden_size": [32]}, "hidden_size must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1024"),
        ({"intermediate_size": 1.5}, "intermediate_size must be a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": 10**400}, "rope_theta must be a number above 0"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"layer_types": 7}, "layer_types must all be 'full_attention'; got 7"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, message, tmp_path):
    config = {**SIZES, "model_type": "llama", **change}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
