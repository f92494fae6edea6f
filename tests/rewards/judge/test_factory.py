"""A judge on the run's own devices: a tiny model that has learnt three replies by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_run
from flax import nnx
from judging import QUESTION
from rich.console import Console

from r3rag_jax.components import Components
from r3rag_jax.config import EndpointConfig, JudgeConfig, LocalJudgeConfig, MeshConfig
from r3rag_jax.errors import UserError
from r3rag_jax.models.hf.decoder_files import save_decoder
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.rewards.judge.factory import judge_memory, local_chat, open_judge
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.types import Passage, Question, Step

TEMPLATE = "{golds}?{answer}"
REPLIES = {("Ada", "Ada L"): "Correct: yes", ("Ada", "Bob"): "**Correct:** no", ("Bob", "Eve"): "Hm."}


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt three replies by heart."""
    path = tmp_path_factory.mktemp("judge")
    tokenizer, model = tiny.tokenizer(path), tiny.decoder()
    rows = []
    for (gold, answer), reply in REPLIES.items():
        prompt = TEMPLATE.replace("{golds}", gold).replace("{answer}", answer)
        before = tokenizer.chat([{"role": "user", "content": prompt}])
        rows.append((before, [*tokenizer.encode(reply), tokenizer.eos_id]))
    length = max(len(before) + len(after) for before, after in rows)
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for row, (before, after) in enumerate(rows):
        tokens[row, : len(before) + len(after)] = [*before, *after]
        mask[row, len(before) : len(before) + len(after)] = True
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    graphdef, params = nnx.split(model)
    tx = optax.adam(1e-2)

    def loss(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        logits = model.logits(model(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens)))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
        return jnp.sum(losses * mask[:, 1:]) / mask.sum()

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    for _ in range(300):
        params, state, value = step(params, state)
        if value < 0.01:
            break
    assert value < 0.05
    save_decoder(nnx.merge(graphdef, params), path, dtype="float32")
    return path


def local_config(path: Path, tmp_path: Path, **settings: Any) -> JudgeConfig:
    (tmp_path / "prompt.txt").write_text(TEMPLATE)
    values = {"correctness_prompt": str(tmp_path / "prompt.txt"), "max_tokens": 24, "max_failure_share": 1.0}
    own = {name: settings.pop(name) for name in list(settings) if name in LocalJudgeConfig.model_fields}
    local = LocalJudgeConfig(**{"path": str(path), "slots": 8, "max_length": 128} | own)
    return JudgeConfig(kind="local", local=local, **values | settings)


def inquire(judge: Judge, gold: str, answer: str) -> Any:
    return judge.correctness(Question("q", "?", (gold,)), answer)


def test_a_local_judge(judge_dir: Path, tmp_path: Path) -> None:
    config, mesh = local_config(judge_dir, tmp_path), make_mesh(MeshConfig())
    judge = open_judge(config, mesh, tmp_path / "j")
    verdicts = judge.ask([inquire(judge, *pair) for pair in REPLIES] * 2)
    np.testing.assert_array_equal(verdicts.values, [1, 0, np.nan] * 2)
    rows = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert {row["reply"] for row in rows if "reply" in row} == {"Correct: yes", "**Correct:** no"}
    assert ["must reply with one line like 'Correct: yes'; got 'Hm.'" in row["failure"] for row in rows
            if "failure" in row] == [True]  # fmt: skip

    again = open_judge(config, mesh, tmp_path / "j")
    engine = again._chat._engine  # type: ignore[attr-defined]
    known = again.ask([inquire(again, *pair) for pair in list(REPLIES)[:2]])
    assert known.num_known == 2 and engine.num_sampled == 0
    short = open_judge(local_config(judge_dir, tmp_path, max_tokens=5), mesh, tmp_path / "short")
    verdicts = short.ask([inquire(short, *pair) for pair in REPLIES])
    assert np.isnan(verdicts.values).all()  # cut off: "Hm." has an end in time, the others have none
    failures = [json.loads(line)["failure"] for line in (tmp_path / "short").read_text().splitlines()]
    assert sum("must end within 5 tokens" in failure for failure in failures) == 2


def test_every_end_of_turn_ends_a_reply(judge_dir: Path, tmp_path: Path) -> None:
    """The judge writes its template's end of turn, which is not the eos_token of its files."""
    tiny.with_several_ends(judge_dir, tmp_path / "several")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "several" / name).symlink_to(judge_dir / name)
    chat = local_chat(local_config(tmp_path / "several", tmp_path), make_mesh(MeshConfig()))
    replies = dict(chat.reply_all([f"{gold}?{answer}" for gold, answer in REPLIES]))
    assert [replies[i] for i in range(3)] == list(REPLIES.values())


def test_a_local_judge_of_another_training_is_another_judge(judge_dir: Path, tmp_path: Path) -> None:
    mesh = make_mesh(MeshConfig())
    chats = [local_chat(local_config(judge_dir, tmp_path, dtype=dtype), mesh) for dtype in ("float32", "bfloat16")]
    assert chats[0].model == chats[1].model and chats[0].identity != chats[1].identity
    (tmp_path / "copy").mkdir()
    for file in judge_dir.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    config = local_config(tmp_path / "copy", tmp_path)
    before = local_chat(config, mesh).identity
    assert local_chat(config, mesh).identity == before
    save_decoder(tiny.decoder(seed=1), tmp_path / "copy", dtype="float32")
    assert local_chat(config, mesh).identity != before


def test_many_prompts_take_turns_in_few_slots(judge_dir: Path, tmp_path: Path) -> None:
    """Replies stand where their prompts stood, and one that is too long has failed by itself."""
    chat_ = local_chat(local_config(judge_dir, tmp_path, slots=8), make_mesh(MeshConfig()))
    pairs = [pair for _ in range(7) for pair in REPLIES]
    prompts = [f"{gold}?{answer}" for gold, answer in pairs]
    prompts.insert(5, "x" * 200)
    replies = dict(chat_.reply_all(prompts))
    too_long = replies.pop(5)
    assert isinstance(too_long, UserError) and "a prompt may have 104 tokens" in str(too_long)
    assert [replies[i] for i in sorted(replies)] == [REPLIES[pair] for pair in pairs]


def test_what_a_local_judge_keeps_on_a_device_is_planned(judge_dir: Path, tmp_path: Path) -> None:
    config = local_config(judge_dir, tmp_path, max_length=64)  # too few positions to decode on a part of them
    mesh = make_mesh(MeshConfig(fsdp=2, data=-1))
    chat_ = local_chat(config, mesh)
    planned = judge_memory(config, mesh)
    device = jax.devices()[0]

    def held(tree: Any) -> int:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    assert planned == {"judge": held(chat_._decoder), "judge's cache": held(chat_._engine._cache)}
    assert judge_memory(JudgeConfig(endpoint=EndpointConfig(url="http://x")), mesh) == {}


def test_components_plan_and_open_a_local_judge(judge_dir: Path, base: Path, tmp_path: Path) -> None:
    settings = {"rewards.process": "judge", "judge.kind": "local", "judge.local.path": judge_dir,
                "judge.local.slots": 8, "judge.local.max_length": 1024, "judge.max_tokens": 8}  # fmt: skip
    config = tiny_run.config(tmp_path, base, **{name.replace(".", "__"): value for name, value in settings.items()})
    components = Components(config, config.run_directory, console=Console(quiet=True))
    planned = {phase: plans[0].array_bytes for phase, plans in components.memory_plans.items()}
    expected = judge_memory(config.judge, components.mesh)
    assert expected.items() <= planned["rl"].items()
    assert not expected.keys() & {*planned["sft"], *planned["eval"]}
    judge = components.judge
    assert judge is components.judge
    step = Step("hm", query="who", passages=(Passage("a", "Origin is by Darwin."),))
    verdicts = judge.ask([judge.relevance(QUESTION, step) for _ in range(2)])
    assert np.isnan(verdicts.values).all()  # it has learnt no such line
    assert (config.run_directory / "judgements.jsonl").read_text().count("failure") == 1


def test_a_local_judge_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"judge\.local\.path must be a Hugging Face directory with config\.json; got .*none"
    ):
        open_judge(
            JudgeConfig(kind="local", local=LocalJudgeConfig(path=str(tmp_path / "none"))),
            make_mesh(MeshConfig()),
            tmp_path / "j",
        )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the model at .* cannot be read"):
        open_judge(
            JudgeConfig(kind="local", local=LocalJudgeConfig(path=str(tmp_path))),
            make_mesh(MeshConfig()),
            tmp_path / "j",
        )
