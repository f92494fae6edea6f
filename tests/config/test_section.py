"""Sections as Python objects: strict, frozen, hashable, with errors that name the dotted key."""

import ast
import pathlib
import sys
from typing import Any

import pytest
from pydantic import ValidationError

import r3rag_jax.config
from r3rag_jax import errors
from r3rag_jax.config import (
    Config,
    ConfigError,
    EndpointConfig,
    KLConfig,
    MeshConfig,
    RLConfig,
    RolloutConfig,
    Section,
    SFTConfig,
)
from r3rag_jax.errors import UserError


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RLConfig(clip=-1), "rl.clip must be at least 0; got -1"),
        (lambda: RLConfig(clip="wide"), "rl.clip must be a finite number; got 'wide'"),
        (lambda: RLConfig(epochs=1.5), "rl.epochs must be an integer; got 1.5"),
        (lambda: RLConfig(epochs=True), "rl.epochs must be an integer; got True"),
        (lambda: RLConfig(algorithm="sarsa"), "rl.algorithm must be one of ppo, grpo, rloo, reinforce++; got 'sarsa'"),
        (lambda: RLConfig(kl=0.1), "rl.kl must be a section; got 0.1"),
        (lambda: RLConfig(lam=0.9), "unknown key 'rl.lam'"),
        (lambda: RolloutConfig(temperatures=(1.0, float("nan"))), "rollout.temperatures[1] must be a finite number"),
        (lambda: RolloutConfig(temperatures=[1.0]), "rollout.temperatures must be a list of numbers; got [1.0]"),
        (lambda: KLConfig(placement="loss"), "rl.kl.estimator must be k2 or k3 when rl.kl.placement is loss"),
        (lambda: EndpointConfig(url="h"), "url must be an http(s) URL"),
        (lambda: Config(judge={"endpoint": {"retries": -1}}), "judge.endpoint.retries must be at least 0; got -1"),
        (lambda: Config(rl={"kl": {"target": 0.1, "coef": 0.0}}), "rl.kl.coef must be above 0, for"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_the_dotted_key(build: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_a_section_is_frozen_and_hashable_and_equal_by_value() -> None:
    config = SFTConfig(lr=1.0)
    assert config == SFTConfig(lr=1) and hash(config) == hash(SFTConfig(lr=1)) and config != SFTConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 2.0


def test_replace_validates_and_keeps_what_is_not_named() -> None:
    config = Config(name="a").replace(rl=RLConfig().replace(clip=0.3))
    assert (config.name, config.rl.clip, config.rl.epochs) == ("a", 0.3, 1)
    with pytest.raises(ConfigError, match=r"rl\.clip must be at least 0; got -1"):
        config.rl.replace(clip=-1)
    with pytest.raises(ConfigError, match=r"unknown key 'rl\.clp'"):
        config.rl.replace(clp=0.3)
    with pytest.raises(ConfigError, match=r"rl\.async_rollouts must be false when mesh\.distributed is true"):
        config.replace(rl=RLConfig(async_rollouts=True), mesh=MeshConfig(distributed=True))


def test_every_section_knows_where_it_stands() -> None:
    def check(section: Section, dotted: str) -> None:
        # The plain EndpointConfig stands in several places and has no name of its own.
        assert section.dotted == ("" if type(section) is EndpointConfig else dotted)
        for name in type(section).model_fields:
            if isinstance(value := getattr(section, name), Section):
                check(value, f"{dotted}.{name}".lstrip("."))

    check(Config(), "")


@pytest.mark.parametrize("change", [{"min_p": 0.1}, {"top_k_tokens": 5}, {"top_p": 0.9}])
def test_truncates_says_whether_tokens_are_left_out(change: dict[str, Any]) -> None:
    assert RolloutConfig(**change).truncates and not RolloutConfig().truncates


def test_the_configuration_imports_no_accelerator_library() -> None:
    # `--help` and a wrong key must answer at once, not after seconds of importing JAX.
    allowed = {*sys.stdlib_module_names, "pydantic", "yaml", "r3rag_jax"}
    files = [*pathlib.Path(r3rag_jax.config.__file__).parent.glob("*.py"), pathlib.Path(errors.__file__)]
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed
                if (node.module or "").startswith("r3rag_jax"):
                    assert (node.module or "").startswith(
                        ("r3rag_jax.config", "r3rag_jax.errors", "r3rag_jax.json_text")
                    )
