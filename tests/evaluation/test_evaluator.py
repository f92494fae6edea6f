"""Evaluation: summaries by group, what makes two evaluations comparable, and their files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from attempts import BORN, DARWIN, attempts, question
from fake_backend import FakeBackend
from rich.console import Console

from r3rag_jax.config import (
    Config,
    EvalConfig,
    RolloutConfig,
    ServerConfig,
)
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.evaluator import Evaluator
from r3rag_jax.evaluation.fingerprint import differences
from r3rag_jax.evaluation.metrics import measure_each
from r3rag_jax.evaluation.metrics import summary as row_of
from r3rag_jax.evaluation.results import load_results
from r3rag_jax.evaluation.summary import summarise
from r3rag_jax.evaluation.systems import SYSTEMS
from r3rag_jax.rewards.judge.judge import Judge
from r3rag_jax.rollout.env import EnvFactory
from r3rag_jax.rollout.search_env import search_env_factory
from r3rag_jax.run.directory import RunDirectory
from r3rag_jax.text.protocols import make_protocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.text.transcript import Codec
from r3rag_jax.types import Context, Step


def test_groups_by_type_and_by_seen() -> None:
    summary = summarise("r3rag", attempts(), {"questions": "abc"}).result
    assert (summary["system"], summary["title"], summary["num_questions"]) == ("r3rag", "R3-RAG", 4)
    assert summary["fingerprint"] == {"questions": "abc"}
    assert {name: group["num"] for name, group in summary["groups"].items()} == {
        "all": 4, "bridge": 3, "single": 1, "unseen": 2, "seen": 2,
    }  # fmt: skip
    assert {name: group["em"] for name, group in summary["groups"].items()} == {
        "all": 50.0, "bridge": pytest.approx(100 / 3), "single": 100.0, "unseen": 50.0, "seen": 50.0,
    }  # fmt: skip
    assert summary["groups"]["all"] == row_of(measure_each(attempts(), recall_k=(5,)))
    assert summarise("mine", attempts()[:1], {}).result["title"] == "mine"


def test_a_judge_is_asked_about_answers_that_do_not_match(tmp_path: Path) -> None:
    class Agreeing:
        """Says yes to whatever it is asked, and remembers it."""

        is_collective, model, identity, place = False, "m", "m", "here"

        def __init__(self) -> None:
            self.prompts: list[str] = []

        def reply_all(self, prompts: Sequence[str]) -> Iterator[tuple[int, str | UserError]]:
            self.prompts += prompts
            yield from enumerate(["Correct: yes\nCandidates: Charles Darwin | darwin"] * len(prompts))

        def give_up(self) -> None: ...

    chat = Agreeing()
    judge = Judge(chat, tmp_path / "judgements.jsonl")
    summary = summarise("r3rag", attempts(), {}, EvalConfig(judge=True), judge).result
    assert len(chat.prompts) == 1 and "Question 3?" in chat.prompts[0]
    assert "candidate_em" not in summary["groups"]["all"]
    both = summarise("r3rag", attempts(), {}, EvalConfig(judge=True, candidate_em=True), judge).result
    assert len(chat.prompts) == 2 and "Candidates:" in chat.prompts[1] and "Accepted" not in chat.prompts[1]
    assert both["groups"]["all"]["candidate_em"] == 75.0
    assert {name: group["acc"] for name, group in summary["groups"].items()} == {
        "all": 75.0, "bridge": pytest.approx(200 / 3), "single": 100.0, "unseen": 50.0, "seen": 100.0,
    }  # fmt: skip
    assert all(group["judge_failures"] == 0 for group in summary["groups"].values())


# ---------------------------------------------------------------------------------------- evaluator


class Retriever(tiny.DictRetriever):
    fingerprint = "index 1"


def evaluator_of(run_dir: Path, tokenizer: Tokenizer, config: Config, opened: list[str] | None = None) -> Evaluator:
    """Every policy answers "Shrewsbury" at once, in the form that it is asked in; `opened` gets their names."""

    def open_backend(policy: str) -> FakeBackend:
        if opened is not None:
            opened.append(policy)
        answer = Step("I know.", answer="Shrewsbury")
        codec = Codec(tokenizer, make_protocol("tags"), passage_tokens=100)
        texts = {
            "Reasoning:": " So the answer is: Shrewsbury.",
            "Answer:": " Shrewsbury\n",
            "needed here:": " No.\nSo the final answer is: Shrewsbury",
            "Thought 1:": " I know.\nAction 1: Finish[Shrewsbury]",
        }

        def complete(slot: int, context: Context) -> Sequence[int]:
            asked = tokenizer.decode(context.ids)
            ids = [tokenizer.encode(text) for end, text in texts.items() if asked.endswith(end)]
            return ids[0] if ids else codec.step_ids(answer, 1)

        return FakeBackend(complete)

    def search_env() -> EnvFactory:
        codec = Codec(tokenizer, make_protocol("tags"), passage_tokens=100)
        return search_env_factory(codec, config.rollout, top_k=1, max_passages=4)

    retriever = Retriever([DARWIN, BORN])
    return Evaluator(
        config, RunDirectory(run_dir), tokenizer, retriever, search_env, open_backend, lambda: SimpleNamespace(),
        lambda what: f"digest of {what}", Console(file=io.StringIO()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config_of(**sections: Any) -> Config:
    """A configuration that trains nothing."""
    rollout = RolloutConfig(max_length=2000, max_new_tokens=500)
    return Config(**{"phases": ("index",), "rollout": rollout} | sections)


QUESTIONS = [question("1", "Shrewsbury", type="bridge"), question("2", "Down House", type="single")]


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_is_a_policy_and_an_env(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    opened: list[str] = []
    system = SYSTEMS[name]
    trajectories = evaluator_of(tmp_path, tokenizer, config_of(), opened).rollouts(system, QUESTIONS)
    assert [trajectory.answer for trajectory in trajectories] == ["Shrewsbury"] * 2
    assert [trajectory.question.id for trajectory in trajectories] == ["1", "2"]
    assert opened == [{"cold_start": "sft", "r3rag": "rl"}.get(name, "base")]
    evaluator_of(tmp_path, tokenizer, config_of(), opened).rollouts(system, QUESTIONS, policy="sft")
    assert opened[1:] == ["sft"]


def test_the_phase_evaluates_what_has_no_result_with_its_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = config_of(eval=EvalConfig(systems=("closed_book", "naive_rag")))
    opened: list[str] = []
    evaluator = evaluator_of(tmp_path, tokenizer, config, opened)
    assert evaluator.run(QUESTIONS) and len(opened) == 2
    assert [path.name for path in sorted(tmp_path.rglob("*.json*"))] == [
        "closed_book.json", "closed_book.questions.jsonl", "naive_rag.json", "naive_rag.questions.jsonl",
        "closed_book.jsonl", "naive_rag.jsonl",
    ]  # fmt: skip
    results = load_results(RunDirectory(tmp_path), ("naive_rag", "r3rag", "closed_book"))
    assert [result["title"] for result in results] == ["Naive RAG", "Closed book"]
    assert [result["groups"]["all"]["em"] for result in results] == [50.0, 50.0]
    assert results[0]["fingerprint"] == evaluator.fingerprint("naive_rag", QUESTIONS)
    assert results[0]["fingerprint"]["policy"] == "base digest of base"
    assert len((tmp_path / "trajectories" / "naive_rag.jsonl").read_text().splitlines()) == 2
    assert not evaluator.run(QUESTIONS) and len(opened) == 2
    (tmp_path / "eval" / "closed_book.json").unlink()
    assert evaluator.run(QUESTIONS) and len(opened) == 3
    assert evaluator.run(QUESTIONS[:1]) and len(opened) == 5  # other questions
    first = config_of(eval=EvalConfig(systems=("closed_book",)))
    assert not evaluator_of(tmp_path, tokenizer, first).run(QUESTIONS[:1])


def test_rl_is_not_shown_after_a_cold_start_that_it_did_not_begin_from(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = config_of(eval=EvalConfig(systems=("r3rag",)))
    (tmp_path / "policy" / "rl").mkdir(parents=True)
    provenance = tmp_path / "policy" / "rl" / "provenance.json"
    provenance.write_text('{"cold_start": ""}')
    assert evaluator_of(tmp_path, tokenizer, config).run(QUESTIONS)  # RL from the base, and there is no cold start
    from_base = evaluator_of(tmp_path, tokenizer, config).fingerprint("r3rag", QUESTIONS)
    (tmp_path / "policy" / "sft").mkdir()
    evaluator = evaluator_of(tmp_path, tokenizer, config)
    with pytest.raises(UserError, match=r"policy/rl began from the base model, and this run now has the cold start"):
        evaluator.run(QUESTIONS)
    cold_start = evaluator.fingerprint("cold_start", QUESTIONS)
    assert differences(cold_start, from_base) == ["cold_start"]  # an older result of it beside a new one
    provenance.write_text('{"cold_start": "digest of sft"}')
    assert evaluator.run(QUESTIONS)
    assert differences(cold_start, evaluator.fingerprint("r3rag", QUESTIONS)) == []


def test_another_prompt_makes_the_baselines_out_of_date_and_the_policies_not(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "policy" / "rl").mkdir(parents=True)
    systems = ("closed_book", "r3rag")
    assert evaluator_of(tmp_path, tokenizer, config_of(eval=EvalConfig(systems=systems))).run(QUESTIONS)
    opened: list[str] = []
    chat = config_of(eval=EvalConfig(systems=systems, prompt="chat"))
    assert evaluator_of(tmp_path, tokenizer, chat, opened).run(QUESTIONS)
    assert opened == ["base"]
    assert not evaluator_of(tmp_path, tokenizer, chat, opened).run(QUESTIONS)


def test_a_system_needs_its_policy_unless_a_server_has_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = config_of(eval=EvalConfig(systems=("cold_start",)))
    with pytest.raises(UserError, match=r"eval.systems names cold_start, but phase sft of .* has not finished"):
        evaluator_of(tmp_path, tokenizer, config).run(QUESTIONS)
    (tmp_path / "policy" / "sft").mkdir(parents=True)
    assert evaluator_of(tmp_path, tokenizer, config).run(QUESTIONS)
    served = config_of(eval=EvalConfig(systems=("r3rag",)), rollout=RolloutConfig(server=ServerConfig(url="http://x")))
    assert evaluator_of(tmp_path, tokenizer, served).run(QUESTIONS)
