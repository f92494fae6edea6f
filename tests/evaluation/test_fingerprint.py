"""Fingerprints: every configuration key is in one, or is known not to change a number."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from attempts import question

from r3rag_jax.config import Config
from r3rag_jax.config.evaluation import BASE_SYSTEMS
from r3rag_jax.config.schema import schema, section_names, value_of
from r3rag_jax.config.section import Section
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.fingerprint import (
    BASELINE_KEYS,
    DIGESTED_KEYS,
    JUDGE_KEYS,
    KEYS,
    KEYS_WITHOUT_EFFECT,
    METRIC_KEYS,
    SAMPLING_KEYS,
    SERVER_KEYS,
    Facts,
    describe,
    differences,
    fingerprint,
)
from r3rag_jax.types import Question

GROUPS = {"itself": KEYS, "baselines": BASELINE_KEYS, "server": SERVER_KEYS, "judge": JUDGE_KEYS}
GROUPS |= {"sampling": SAMPLING_KEYS, "metrics": METRIC_KEYS}
GROUPS |= DIGESTED_KEYS | KEYS_WITHOUT_EFFECT
QUESTIONS = [question("1", "Shrewsbury", type="bridge"), question("2", "Down House")]


def groups_of(name: str) -> list[str]:
    """The tables that name a key; a section counts where no table names the key itself."""
    own = [group for group, keys in GROUPS.items() if name in keys]
    return own or [group for group, keys in GROUPS.items() if any(name.startswith(f"{key}.") for key in keys)]


def with_value(section: Any, path: list[str], value: Any) -> Any:
    """A copy with another value of a key; relations between keys are not checked."""
    name, *rest = path
    return section.model_copy(update={name: with_value(getattr(section, name), rest, value) if rest else value})


def change(config: Config, name: str) -> Config:
    """The configuration with another value of the right type for a key."""
    kind, value = schema()[name].type, value_of(config, name)
    if typing.get_origin(kind) is Literal:
        other: Any = next((choice for choice in typing.get_args(kind) if choice != value), "another")
    elif typing.get_origin(kind) is tuple:
        other = value[:-1] or (typing.get_args(kind)[0](7),)
    elif kind is str:
        other = f"{value}x"
    else:
        other = not value if kind is bool else value + 1
    return with_value(config, name.split("."), other)


def facts(config: Config, system: str = "r3rag", questions: list[Question] = QUESTIONS, **digests: str) -> Facts:
    return fingerprint(config, system, "rl", digests.pop("index", "i"), questions, lambda what: digests.get(what, what))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A judge and a server are asked and temperature is above 0, so that their keys count."""
    prompts = {name: tmp_path / f"{name}.txt" for name in ("prompt", "promptx")}
    for name, path in prompts.items():
        path.write_text(f"{name} {{question}} {{golds}} {{answer}} Correct: yes Candidates: x")
    made: Section = Config()
    for name, value in {
        "phases": ("index",),
        "eval.judge": True,
        "eval.candidate_em": True,
        "eval.temperature": 0.5,
        "judge.correctness_prompt": str(tmp_path / "prompt.txt"),
        "judge.candidates_prompt": str(tmp_path / "prompt.txt"),
        "judge.endpoint.model": "m",
        "rollout.server.url": "http://x",
    }.items():
        made = with_value(made, name.split("."), value)
    return typing.cast(Config, made)


def test_every_key_is_in_exactly_one_table() -> None:
    assert {name: groups for name in schema() if len(groups := groups_of(name)) != 1} == {}
    named = [key for keys in GROUPS.values() for key in keys]
    assert set(named) <= {*schema(), *section_names()} and len(named) == len(set(named))


@pytest.mark.parametrize("name", schema())
def test_a_key_changes_the_fingerprint_or_is_listed(name: str, config: Config, tmp_path: Path) -> None:
    """For a baseline, with server and judge; what reaches the numbers through a digest changes that digest instead."""
    if name in ("judge.correctness_prompt", "judge.candidates_prompt"):
        other = with_value(config, name.split("."), str(tmp_path / "promptx.txt"))
    elif name == "model.chat_template":
        other = with_value(config, name.split("."), "chatml")
    elif name == "judge.endpoint.url":  # counts where no model is named, the model's path with a local judge
        config = with_value(config, ["judge", "endpoint", "model"], "")
        other = change(config, name)
    else:
        if name.startswith("judge.local."):
            config = with_value(config, ["judge", "kind"], "local")
        other = change(config, name)
    table = groups_of(name)[0]
    counts = table in ("itself", "baselines", "server", "judge", "sampling", "metrics", "tokenizer")
    is_path = name == "judge.local.path"  # the digest of the files there counts

    def digests(config: Config) -> dict[str, str]:
        return {"judge": config.judge.local.path}

    own = name.split(".")[1] if name.startswith("baselines.") else ""
    system = own if own in BASE_SYSTEMS else "ircot"
    before, after = (facts(c, system, **digests(c)) for c in (config, other))
    assert (before != after) == counts
    assert not is_path or before["judge"] != after["judge"]


def test_a_policy_is_not_out_of_date_when_the_baselines_prompt_changes() -> None:
    config = Config()
    chat = change(config, "eval.prompt")
    assert facts(config) == facts(chat) and facts(config, "cold_start") == facts(chat, "cold_start")
    for system in BASE_SYSTEMS:
        assert facts(config, system) != facts(chat, system)


def test_a_baseline_is_not_out_of_date_when_another_ones_settings_change() -> None:
    config = Config()
    other = change(config, "baselines.flare.threshold")
    assert [name for name in BASE_SYSTEMS if facts(config, name) != facts(other, name)] == ["flare"]


def test_digests_of_contents_count() -> None:
    config = Config()
    plain = facts(config)
    others = [facts(config, **{name: "other"}) for name in ("rl", "tokenizer", "index", "corpus")]
    others += [
        facts(config, questions=asked)
        for asked in (
            QUESTIONS[::-1],
            QUESTIONS[:1],
            [QUESTIONS[0], question("2", "z")],
            [QUESTIONS[0], question("3", "Down House")],
            [QUESTIONS[0], question("2", "Down House", supporting_ids=["7"])],
            [QUESTIONS[0], question("2", "Down House", type="single")],
        )
    ]
    words = "num_questions"
    assert all(sum(plain[name] != other[name] for name in plain if name != words) == 1 for other in others)
    assert facts(config) == plain and plain["policy"] == "rl rl"
    assert (plain["server"], plain["judge"], plain["sampling"]) == ({}, {}, {})
    assert (plain["num_questions"], plain["metrics"]["em"], plain["metrics"]["answer_recall@5"]) == (2, 1, 1)


def test_a_served_policy_is_known_by_the_server_alone(config: Config) -> None:
    found = facts(config, rl="other")
    assert found["policy"] == "" and found["server"] == {
        "url": "http://x", "model": "", "prompt_format": "ids", "extra_fields": True,
    }  # fmt: skip
    assert found["judge"]["model"] == "m"


def test_a_judges_prompt_that_cannot_be_read_is_the_users_to_fix(config: Config) -> None:
    missing = with_value(config, ["judge", "correctness_prompt"], "/nowhere/prompt.txt")
    with pytest.raises(UserError, match=r"judge\.correctness_prompt must be a text file; /nowhere/prompt\.txt"):
        facts(missing)


def test_a_table_compares_systems_and_policies_that_share_the_rest() -> None:
    config, more = Config(), change(Config(), "retrieval.top_k")
    one, baseline = facts(config), facts(config, "ircot", rl="other")
    assert one != baseline and differences(one, baseline) == []
    assert differences(one, facts(more, "ircot", questions=QUESTIONS[:1])) == ["questions", "retrieval.top_k"]
    assert differences(facts(config, "ircot"), facts(change(config, "eval.prompt"), "naive_rag")) == ["eval.prompt"]


def test_words_do_not_part_what_digests_join() -> None:
    one = facts(Config())
    assert differences(one, one | {"split": "hotpotqa-dev", "num_questions": 3}) == []
    other = one | {"questions": "o", "split": "dev", "num_questions": 400, "retrieval.top_k": 5}
    names = differences(one, other)
    assert describe(one, other, names) == "questions (2 of , 400 of dev), retrieval.top_k (2, 5)"
    assert differences(one, other, ["questions"]) == ["retrieval.top_k"]


def test_metrics_and_judges_are_compared_as_far_as_both_have_them(config: Config) -> None:
    judged, plain = facts(config), facts(with_value(config, ["eval", "judge"], False))
    assert judged["metrics"].keys() - plain["metrics"].keys() == {"acc"}
    assert differences(judged, plain) == [] and differences(judged, plain | {"judge": {}}) == []
    assert differences(judged, judged | {"metrics": judged["metrics"] | {"f1": 2}}) == ["metrics"]
    assert differences(judged, judged | {"judge": judged["judge"] | {"model": "n"}}) == ["judge"]
