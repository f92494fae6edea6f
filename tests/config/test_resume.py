"""Which keys may change when a run is resumed."""

from typing import Any

import pytest

from r3rag_jax.config import (
    BaselinesConfig,
    Config,
    DataConfig,
    EncoderConfig,
    EndpointConfig,
    EvalConfig,
    GuardsConfig,
    JudgeConfig,
    KLConfig,
    LocalJudgeConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    NaiveRAGConfig,
    RemoteRetrieverConfig,
    RetrievalConfig,
    RewardConfig,
    RLConfig,
    RolloutConfig,
    ServerConfig,
    SFTConfig,
)
from r3rag_jax.config.resume import (
    CONNECTION_KEYS,
    FREE_KEYS,
    FREE_OF_JUDGE,
    FREE_OF_RETRIEVAL,
    FREE_UNLESS_ASYNC,
    changed_keys,
)
from r3rag_jax.config.schema import schema, section_names


def test_every_free_key_is_a_key_or_a_section() -> None:
    free = [key for keys in FREE_KEYS.values() for key in keys]
    assert {*free, *FREE_UNLESS_ASYNC, *FREE_OF_JUDGE, *FREE_OF_RETRIEVAL} <= {*schema(), *section_names()}
    assert {"model", *CONNECTION_KEYS} == set(EndpointConfig.model_fields)


@pytest.mark.parametrize(
    "change",
    [
        {"run_dir": "elsewhere"},
        {"phases": ("index",)},
        {"eval": EvalConfig(max_questions=3)},
        {"guards": GuardsConfig(kl=1.0)},
        {"mesh": MeshConfig(fsdp=2)},
        {"log": LogConfig(trackers=("trackio",))},
        {"budget": "cpu"},
        {"data": DataConfig(test="other.jsonl")},
        {"model": ModelConfig(remat="dots", micro_tokens=512)},
        {"rollout": RolloutConfig(slots=3, shard_weights=True, decode_chunk=5, search_overlap=2)},
        {"retrieval": RetrievalConfig(index_dir="moved", encoder=EncoderConfig(batch_tokens=99))},
        {"baselines": BaselinesConfig(naive_rag=NaiveRAGConfig(top_k=3))},
        {"sft": SFTConfig(checkpoint_every=7), "rl": RLConfig(checkpoint_every=7, eval_every=3)},
        {"phases": ("index",), "rollout": RolloutConfig(server=ServerConfig(url="http://h", model="m", retries=1))},
        {"retrieval": RetrievalConfig(endpoint=RemoteRetrieverConfig(url="http://h", retries=1, timeout_s=60.0))},
        {"judge": JudgeConfig(max_tokens=3, endpoint=EndpointConfig(model="m"))},
    ],
    ids=str,
)
def test_what_computes_the_same_may_change(change: dict[str, Any]) -> None:
    assert changed_keys(Config(), Config(**change)) == {}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"seed": 1}, {"seed": (0, 1)}),
        ({"name": "other"}, {"name": ("run", "other")}),
        ({"rl": RLConfig(kl=KLConfig(coef=0.5), clip=0.1)}, {"rl.clip": (0.2, 0.1), "rl.kl.coef": (0.01, 0.5)}),
        ({"rollout": RolloutConfig(slots=3, max_steps=4)}, {"rollout.max_steps": (5, 4)}),
        ({"rollout": RolloutConfig(kv_dtype="int8")}, {"rollout.kv_dtype": ("auto", "int8")}),
        ({"model": ModelConfig(attention="splash", remat="full")}, {"model.attention": ("xla", "splash")}),
        ({"data": DataConfig(rl="other.jsonl")}, {"data.rl": ("", "other.jsonl")}),
        ({"sft": SFTConfig(epochs=4, checkpoint_every=7)}, {"sft.epochs": (3, 4)}),
        (
            {"retrieval": RetrievalConfig(endpoint=RemoteRetrieverConfig(model="m", timeout_s=60.0))},
            {"retrieval.endpoint.model": ("", "m")},
        ),
    ],
)
def test_other_changes_are_told_with_both_values(change: dict[str, Any], changed: dict[str, Any]) -> None:
    assert changed_keys(Config(), Config(**change)) == changed


def test_checkpoints_and_evaluations_say_which_policy_samples_asynchronously() -> None:
    old = Config(rl=RLConfig(async_rollouts=True))
    new = old.replace(rl=old.rl.replace(checkpoint_every=7, eval_every=3))
    assert changed_keys(old, new) == {"rl.eval_every": (10, 3), "rl.checkpoint_every": (10, 7)}


def test_a_judge_with_a_say_in_rewards_may_move_but_not_change() -> None:
    old = Config(
        rewards=RewardConfig(process="judge"), judge=JudgeConfig(endpoint=EndpointConfig(url="http://h", model="m"))
    )
    moved = EndpointConfig(url="https://other", model="m", key_env="K", retries=1, max_in_flight=2)
    assert changed_keys(old, old.replace(judge=JudgeConfig(cache="c", max_failure_share=0.5, endpoint=moved))) == {}
    other = JudgeConfig(endpoint=EndpointConfig(url="http://h", model="n"))
    assert changed_keys(old, old.replace(judge=other)) == {"judge.endpoint.model": ("m", "n")}
    local = JudgeConfig(kind="local", local=LocalJudgeConfig(path="p", slots=3))
    assert changed_keys(old, old.replace(judge=local)) == {
        "judge.kind": ("server", "local"),
        "judge.endpoint.model": ("m", ""),
        "judge.local.path": ("", "p"),
    }
