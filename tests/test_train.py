"""A whole run in miniature, in both protocols: its files, its resuming, what the entry points do with it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import AxisType
from rich.console import Console
from safetensors.numpy import load_file

from r3rag_jax import ask, evaluate
from r3rag_jax import components as components_module
from r3rag_jax.components import Components
from r3rag_jax.config import Config, MeshConfig, RLConfig, RolloutConfig, SFTConfig, load_config
from r3rag_jax.data.jsonl import read_rows
from r3rag_jax.data.questions import read_passages, read_questions
from r3rag_jax.data.trajectories import trajectory_from_dict
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.mesh import AXES, make_mesh
from r3rag_jax.rewards.base import Resources
from r3rag_jax.rewards.scorer import Scorer, Scores
from r3rag_jax.rl import algorithms
from r3rag_jax.rollout.request import RolloutRequest
from r3rag_jax.run.checkpoints import Checkpoints
from r3rag_jax.sampler import memory
from r3rag_jax.training import rl, sft, steps
from r3rag_jax.training.memory_plan import plan_memory, undivided
from r3rag_jax.training.requests import iteration_jobs
from r3rag_jax.training.trainer import RLTrainer, equal_groups, number_groups
from r3rag_jax.types import Question, Sample, Status, Step, Trajectory

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")
PROTOCOLS = ("tags", "steps")
SYSTEMS = ("closed_book", "oneshot_rag", "cold_start", "r3rag")


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


def weights(run_dir: Path, phase: str) -> dict[str, np.ndarray]:
    return load_file(run_dir / "policy" / phase / "model.safetensors")


# ----------------------------------------------------------------------------------- a finished run


def test_a_run_leaves_all_its_files(protocol: str, finished: Callable[[str], Path]) -> None:
    run_dir = finished(protocol)
    assert load_config(run_dir / "config.yaml").rollout.protocol == protocol
    assert (run_dir / "report.html").stat().st_size > 1000
    corpus = {passage.id for passage in read_passages(run_dir / "data" / "corpus.jsonl")}
    for split, count in (("rl", 12), ("dev", 2), ("test", 4)):
        questions = read_questions(run_dir / "data" / f"{split}.jsonl")
        assert len(questions) == count
        assert all(set(question.supporting_ids) <= corpus for question in questions)
    for phase in ("sft", "rl"):
        assert {p.name for p in (run_dir / "policy" / phase).iterdir()} >= {
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        }  # fmt: skip
        assert all(np.isfinite(array).all() for array in weights(run_dir, phase).values())
        assert any((run_dir / "checkpoints" / phase).iterdir())
    assert not list((run_dir / "policy").glob(".*"))  # no half-written export


def test_metrics_have_one_finite_line_a_step(protocol: str, finished: Callable[[str], Path]) -> None:
    rows = [json.loads(line) for line in (finished(protocol) / "metrics.jsonl").read_text().splitlines()]
    for phase, names in (
        ("sft", {"loss", "accuracy", "grad_norm", "tokens_per_s"}),
        ("rl", {"reward", "em", "f1", "kl", "entropy", "policy_loss", "value_loss", "clip_fraction", "sampler_gap",
                "explained_variance", "mean_retrievals", "format_error_rate", "no_answer_rate", "tokens_per_s"}),
    ):  # fmt: skip
        mine = [row for row in rows if row["phase"] == phase]
        assert [row["step"] for row in mine] == list(range(len(mine)))
        for row in mine:
            assert names <= row.keys()
            assert all(math.isfinite(value) for name, value in row.items() if name != "phase")
    assert [row["phase"] for row in rows] == sorted((row["phase"] for row in rows), reverse=True)  # sft, then rl
    sft = [row["loss"] for row in rows if row["phase"] == "sft"]
    assert sft[-1] < 0.3 * sft[0]
    rl = [row for row in rows if row["phase"] == "rl"]
    assert len(rl) == 3
    assert all(row["sampler_gap"] < 1e-3 for row in rl)
    assert max(row["mean_retrievals"] for row in rl) > 0.2  # so that whole steps and passages are in the batches
    assert rl[0]["kl"] == pytest.approx(0, abs=1e-4)  # the first rollouts are the reference's own
    assert ["dev_em" in row for row in rl] == [False, False, True]


def test_evaluations_and_trajectories(protocol: str, finished: Callable[[str], Path]) -> None:
    run_dir = finished(protocol)
    marks = []
    for system in SYSTEMS:
        summary = json.loads((run_dir / "eval" / f"{system}.json").read_text())
        assert (summary["system"], summary["num_questions"], summary["groups"]["all"]["num"]) == (system, 4, 4)
        marks.append(summary["fingerprint"])
        rows = [row for _, row in read_rows(run_dir / "trajectories" / f"{system}.jsonl")]
        played = [trajectory_from_dict(row) for row in rows]
        asked = read_questions(run_dir / "data" / "test.jsonl")
        assert [t.question for t in played] == asked
        assert max(t.num_retrievals for t in played) <= {"closed_book": 0, "oneshot_rag": 1}.get(system, 3)
    assert all(mark == marks[0] for mark in marks)
    rows = [row for _, row in read_rows(run_dir / "trajectories" / "rl.jsonl")]
    assert [row["iteration"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert all(math.isfinite(row["reward"]) for row in rows)


def test_the_same_command_again_changes_nothing(protocol: str, finished: Callable[[str], Path], base: Path) -> None:
    run_dir = finished(protocol)
    before = tiny_run.files(run_dir)
    said = tiny_run.train(run_dir.parent, base, protocol)
    for phase in ("index", "sft", "rl", "eval"):
        assert f"{phase}  done before" in said
    assert "All is done" in said and "report.html" in said
    assert tiny_run.files(run_dir).keys() == before.keys()
    assert {name for name, content in tiny_run.files(run_dir).items() if content != before[name]} <= {"report.html"}


# --------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    """Stands for a preempted machine."""


@pytest.mark.parametrize("protocol", ["tags", pytest.param("steps", marks=pytest.mark.slow)], indirect=True)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    protocol: str, finished: Callable[[str], Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two checkpoints of each phase: parameters and metrics are the same bits in the end."""
    make_sft_step, save = sft.make_sft_step, RLTrainer.save

    def make_mortal_step(*args):
        step, calls = make_sft_step(*args), itertools.count()

        def mortal(*args):
            if next(calls) == 12:  # the checkpoint at 8 is behind, and a few more steps are logged
                raise Killed
            return step(*args)

        return mortal

    def mortal_save(trainer):
        if trainer.iteration == 2:  # the iteration is trained and logged, but its checkpoint is lost
            raise Killed
        save(trainer)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sft, "make_sft_step", make_mortal_step)
        tiny_run.train(tmp_path, base, protocol)
    assert not (tmp_path / "run" / "policy").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RLTrainer, "save", mortal_save)
        tiny_run.train(tmp_path, base, protocol)
    assert [p.name for p in (tmp_path / "run" / "policy").iterdir()] == ["sft"]
    said = tiny_run.train(tmp_path, base, protocol)
    assert "sft  done before" in said and "rl  done before" not in said

    whole, resumed = finished(protocol), tmp_path / "run"
    assert tiny_run.metrics(resumed) == tiny_run.metrics(whole)
    one, other = tiny_run.files(whole), tiny_run.files(resumed)
    same = [name for name in one if name.split("/")[0] in ("data", "policy", "trajectories", "eval")]
    assert len(same) > 20
    assert [name for name in same if other.get(name) != one[name]] == []


# --------------------------------------------------------------------------------------- adapters


@pytest.mark.slow
def test_adapters_are_trained_resumed_and_merged(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cold start of the other run; killed before the last checkpoint and resumed, the same bits in the end."""
    base = finished("tags") / "policy" / "sft"
    settings = {
        "lora.rank": 4,
        "sft.epochs": 2,
        "rl.iterations": 2,
        "rl.critic.kind": "separate",
        "phases": "[index, sft, rl]",
    }
    settings |= {"sft.lr": 1e-3, "rl.eval_every": 2}
    keys = {name.replace(".", "__"): value for name, value in settings.items()}
    tiny_run.train(tmp_path / "whole", base, **keys)
    save = RLTrainer.save

    def mortal_save(trainer):
        save(trainer)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RLTrainer, "save", mortal_save)
        tiny_run.train(tmp_path / "resumed", base, **keys)
    tiny_run.train(tmp_path / "resumed", base, **keys)
    whole, resumed = tmp_path / "whole" / "run", tmp_path / "resumed" / "run"
    assert tiny_run.metrics(whole) == tiny_run.metrics(resumed)

    rl = [row for row in tiny_run.metrics(whole) if row["phase"] == "rl"]
    assert rl[0]["kl"] == pytest.approx(0, abs=1e-4)  # the first rollouts are the frozen weights' own
    assert all(row["sampler_gap"] < 1e-3 for row in rl)
    before = load_file(base / "model.safetensors")
    for phase in ("sft", "rl"):
        after = weights(whole, phase)
        assert after.keys() == before.keys()
        np.testing.assert_equal(after, weights(resumed, phase))
        moved = {name for name, array in after.items() if not np.array_equal(array, before[name])}
        assert moved == {name for name in before if "_proj.weight" in name or "embed_tokens" in name}
        change = after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]
        assert set(np.flatnonzero(change.any(axis=1))) <= set(range(3, 11))  # the tags
        before = after


# ---------------------------------------------------------------------------------- rollouts ahead


@pytest.mark.slow
@pytest.mark.parametrize("sampler_devices", [4, 0])
def test_rollouts_ahead_are_one_step_behind_and_resume_as_they_were(
    finished: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler_devices: int
) -> None:
    """On devices of their own, or beside the updates on one; killed while some are under way, and the same bits."""
    if sampler_devices == 0:
        alone = jax.make_mesh((1, 1, 1), AXES, devices=jax.devices()[:1], axis_types=(AxisType.Auto,) * 3)
        monkeypatch.setattr(components_module, "make_mesh", lambda config: alone)
    settings = {
        "mesh__sampler_devices": sampler_devices, "rl__async_rollouts": "true", "rl__iterations": 5,
        "rl__checkpoint_every": 3, "rl__eval_every": 5, "phases": "[index, rl]", "rl__entropy_coef": 0.1,
    }  # fmt: skip  # with entropy even the first update moves the policy, whatever the rewards
    base, played = finished("tags") / "policy" / "sft", []
    play, update = rl.Rollouts._play, RLTrainer.update

    def kept_play(rollouts, iteration, params):
        trajectories = play(rollouts, iteration, params)
        played.append((iteration, jax.tree.leaves(params), trajectories))
        return trajectories

    def mortal_update(trainer, trajectories, scores):
        if trainer.iteration == 4:
            raise Killed
        return update(trainer, trajectories, scores)

    with monkeypatch.context() as patch:
        patch.setattr(rl.Rollouts, "_play", kept_play)
        tiny_run.train(tmp_path / "whole", base, **settings)
    assert [iteration for iteration, _, _ in played] == [0, 1, 2, 3, 4]
    policies = [params for _, params, _ in played]
    # 1 has the policy of 0, 2 that behind the first update; 3 is sampled behind the checkpoint, by today's policy.
    assert are_equal(policies[0], policies[1]) and not are_equal(policies[1], policies[2])
    assert are_equal(policies[3], policies[4]) and not are_equal(policies[2], policies[3])
    devices = jax.devices()[4:] if sampler_devices else jax.devices()[:1]
    assert all(leaf.sharding.device_set == set(devices) for leaf in policies[1])

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RLTrainer, "update", mortal_update)
        tiny_run.train(tmp_path / "resumed", base, **settings)
    tiny_run.train(tmp_path / "resumed", base, **settings)
    whole, resumed = tmp_path / "whole" / "run", tmp_path / "resumed" / "run"
    assert tiny_run.metrics(whole) == tiny_run.metrics(resumed)
    np.testing.assert_equal(weights(whole, "rl"), weights(resumed, "rl"))
    gaps = [row["sampler_gap"] for row in tiny_run.metrics(whole)]
    assert max(gaps[0], gaps[3]) < 1e-4 < min(gaps[1], gaps[2], gaps[4])


def are_equal(one: list[jax.Array], other: list[jax.Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_rollouts_ahead_need_devices_that_nothing_else_launches_on(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rl.async_rollouts must have one device, or mesh.sampler_devices of its own"):
        tiny_run.train(tmp_path, base, rl__async_rollouts="true", phases="[index, rl]")


# ---------------------------------------------------------------------------- jobs of an iteration


def test_every_question_comes_once_before_any_comes_again() -> None:
    questions = [Question(str(i), f"q{i}", ("x",)) for i in range(10)]
    config = Config(rl=RLConfig(questions=4), rollout=RolloutConfig(samples=3, temperatures=(0.4, 1.0)))
    jobs = [iteration_jobs(config, questions, iteration) for iteration in range(5)]
    ids = [job.question.id for iteration in jobs for job in iteration[::3]]
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(str(i) for i in range(10))
    assert ids[:10] != ids[10:] and ids[:10] != sorted(ids[:10])
    assert [(job.sample_index, job.temperature) for job in jobs[0][:3]] == [(0, 0.4), (1, 1.0), (2, 0.4)]
    assert jobs[2] == iteration_jobs(config, questions, 2)
    assert len({job.seed for iteration in jobs for job in iteration}) == 5
    assert {job.seed for job in jobs[0]}.isdisjoint({job.seed for job in iteration_jobs(
        Config(seed=1, rl=config.rl, rollout=config.rollout), questions, 0)})  # fmt: skip


def test_questions_that_teach_nothing_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake policy answers questions of an even number right or wrong in turn, and all others wrong."""
    questions = [Question(str(i), f"q{i}", ("x",)) for i in range(12)]
    rl_config = RLConfig(algorithm="grpo", questions=4, max_resamples=2)
    config = Config(rl=rl_config, rollout=RolloutConfig(samples=2, temperatures=(1.0,)))
    played: list[list[int]] = []

    def play(backend: Any, env_factory: Any, retriever: Any, jobs: list[RolloutRequest], **_: Any) -> list[Trajectory]:
        played.append([int(job.question.id) for job in jobs[::2]])
        is_right = [int(job.question.id) % 2 == 0 and job.sample_index == 0 for job in jobs]
        steps = [(Step("a", answer="x" if right else "y"),) for right in is_right]
        return [Trajectory(job.question, s, Status.ANSWERED) for job, s in zip(jobs, steps, strict=True)]

    components = SimpleNamespace(
        config=config, mesh=None, sampler_mesh=None, dataset=SimpleNamespace(questions=lambda _: questions),
        to_sampler=lambda params: params,
        engine_backend=lambda policy: None, search_env=None, retriever=None,
        scorer=Scorer(config.rewards, Resources(config.rollout.max_steps)),
    )  # fmt: skip
    monkeypatch.setattr(rl, "rollout", play)
    for iteration in range(3):
        played.clear()
        trajectories = rl.Rollouts(components).of(iteration, None)
        numbers = [number for draw in played for number in draw]
        assert len(set(numbers)) == len(numbers) and 1 < len(played) <= 3
        for draw, before in zip(played[1:], itertools.accumulate(played), strict=False):
            assert len(draw) == min(4 - sum(n % 2 == 0 for n in before), 12 - len(before))  # as many as are missing
        assert [int(t.question.id) for t in trajectories[::2]] == numbers
        again = [*played]
        played.clear()
        rl.Rollouts(components).of(iteration, None)
        assert played == again


# ------------------------------------------------------------------------ entry points on the result


def test_evaluate_on_other_questions_and_passages(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(finished("tags"), tmp_path / "run")
    questions, corpus = tmp_path / "mine.jsonl", tmp_path / "corpus.jsonl"
    questions.write_text('{"id": "1", "question": "Who wrote The Red Door?", "golden_answers": ["Bala Sen"]}\n')
    corpus.write_text('{"id": "p", "contents": "\\"The Red Door\\"\\nThe Red Door is by Bala Sen."}\n')
    argv = ["--checkpoint", str(run_dir), "--questions", str(questions), "--corpus", str(corpus), "retrieval.top_k=2"]
    assert evaluate.main(argv) == 0
    summary = json.loads((run_dir / "eval" / "mine.json").read_text())
    assert summary["num_questions"] == 1
    test_mark = json.loads((run_dir / "eval" / "r3rag.json").read_text())["fingerprint"]
    assert all(summary["fingerprint"][name] != test_mark[name] for name in ("questions", "index", "top_k"))
    [row] = [row for _, row in read_rows(run_dir / "trajectories" / "mine.jsonl")]
    assert {passage["id"] for step in row["steps"] for passage in step.get("passages", ())} <= {"p"}
    assert "EM" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--phase", "sft"]])
def test_ask_shows_a_trajectory(
    flags: list[str], finished: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask.main(["--checkpoint", str(finished("tags")), *flags, "Who wrote The Red Door?"]) == 0
    assert "Who wrote The Red Door?" in capsys.readouterr().out


def test_groups_without_a_difference_are_found() -> None:
    rewards = [np.array(r, np.float32) for r in ([0.5, 2.0], [0.5, 2.0], [1.0], [0.5, 0.5], [1.0], [1.0, 0.0])]
    ids = ("easy", "easy", "hard", "hard", "short", "short")
    trajectories = [Trajectory(Question(id, "q", ("a",)), (), Status.ANSWERED) for id in ids]
    groups = number_groups(trajectories)
    assert groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert equal_groups(rewards, groups, totals=False).tolist() == [True, True, False, False, True, True]
    assert equal_groups(rewards, groups, totals=True).tolist() == [True] * 6


# ----------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("rank", [0, 2])
def test_planned_memory_is_what_the_trainer_holds(base: Path, tmp_path: Path, rank: int) -> None:
    config = tiny_run.config(tmp_path, base, lora__rank=rank, rl__critic__kind="separate", mesh__fsdp=2)
    components = Components(config, config.run_directory)
    [planned] = plan_memory(components, "rl")
    rl = RLTrainer(components)

    def held(tree: object) -> int:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])

    assert planned.parts["reference"] == held(rl._ref_params)
    assert planned.parts["trained"] == held(rl.state.params)
    assert planned.parts["optimizer"] == held(rl.state.opt_state)
    assert planned.parts.get("merged", 0) == (held(rl.policy_params) if rank else 0)
    assert planned.parts["policy of rollouts"] == held(components.to_sampler(rl.policy_params))


def test_more_slots_than_memory_are_refused_before_anything_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 8 * 2**30)
    with pytest.raises(UserError, match=r"rollout.slots must be at most \d+ for 1.00 GiB of memory; got 1000000"):
        tiny_run.train(tmp_path, base, rollout__slots=1000000)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------- algorithms

OPTIONS = {
    "ppo": {"rl.kl.target": 1e-3, "rl.max_importance_weight": 2.0, "rollout.protocol": "steps"},
    "grpo": {
        "rl.normalize_std": "true", "rl.returns": "total", "rl.loss_aggregation": "sequence", "rl.clip_high": 0.28,
        "rl.kl.coef": 0.1, "rl.kl.placement": "loss", "rl.kl.estimator": "k3", "rl.whiten_advantages": "false",
    },
    "rloo": {
        "rl.loss_aggregation": "constant", "rl.kl.coef": 0.0, "rollout.protocol": "steps", "rl.step_discount": 0.5
    },
    "reinforce++": {"rl.whiten_rewards": "true", "rl.kl.estimator": "k2"},
}  # fmt: skip
NUM_PROMPT, STEP_TOKENS = 6, 5


def written(components: Components, question: str, index: int, num_steps: int) -> Trajectory:
    """A trajectory of random tokens in the session's layout, as a sampler would hand it over."""
    rng = np.random.default_rng((ord(question), index))
    rows = [[-1] * NUM_PROMPT + [step] * STEP_TOKENS for step in range(num_steps)]
    if components.codec.protocol.is_one_sequence:
        rows = [[id for row in rows for id in row]]
    samples = []
    for row in rows:
        steps = np.asarray(row, np.int32)
        logprobs = np.where(steps >= 0, -rng.uniform(5, 9, len(row)), 0).astype(np.float32)
        samples.append(Sample(rng.integers(0, 1000, len(row)).astype(np.int32), steps >= 0, logprobs, steps))
    taken = (Step("a", query="q"),) * (num_steps - 1) + (Step("a", answer="b"),)
    return Trajectory(Question(question, "?", ("b",)), taken, Status.ANSWERED, tuple(samples), index)


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(name, marks=pytest.mark.slow if name in ("grpo", "reinforce++") else ()) for name in OPTIONS],
)
def test_every_algorithm_updates_the_policy_and_resumes(algorithm: str, base: Path, tmp_path: Path) -> None:
    settings = {"rl.algorithm": algorithm, "rl.questions": 3, "rl.batch_rows": 8, "rl.row_length": 320}
    keys = {name.replace(".", "__"): value for name, value in (settings | OPTIONS[algorithm]).items()}
    config = tiny_run.config(tmp_path, base, keys.pop("rollout__protocol", "tags"), **keys)
    components = Components(config, config.run_directory)
    plays = zip("xxyyzz", (0, 1) * 3, (3, 1, 2, 2, 1, 2), strict=True)
    trajectories = [written(components, q, i, n) for q, i, n in plays]
    rewards = [np.asarray(r, np.float32) for r in ([0.5, 0.5, 2], [-1], [0.8, 2], [0.8, 2], [0], [1, -0.5])]
    scores = Scores(rewards, np.zeros((6, 3), np.float32), {}, {})
    one = RLTrainer(components)
    metrics = one.update(trajectories, scores)
    assert all(math.isfinite(value) for value in metrics.values())
    is_grouped = algorithm in ("grpo", "rloo")
    assert metrics["equal_groups"] == pytest.approx(1 / 3)  # y
    assert metrics["learnt_from"] == pytest.approx(2 / 3 if is_grouped else 1)
    assert ("explained_variance" in metrics) == ("value_loss" in metrics) == (algorithm == "ppo")
    assert ("kl" in metrics) == (algorithm != "rloo")
    assert ("kl_loss" in metrics) == (algorithm == "grpo")
    assert ("weight" in metrics) == (algorithm == "ppo")
    assert metrics["grad_norm"] > 0
    one.save()
    other = RLTrainer(components)  # from the checkpoint
    assert other.iteration == 1 and other.kl == one.kl
    if algorithm == "ppo":
        change = min(max((metrics["kl"] - 1e-3) / 1e-3, -0.2), 0.2)
        assert one.kl == pytest.approx(config.rl.kl.coef * (1 + 0.1 * change), rel=1e-6) and one.kl != config.rl.kl.coef
    again, resumed = (trainer.update(trajectories, scores) for trainer in (one, other))
    assert again == resumed and again["policy_loss"] != metrics["policy_loss"]


# ------------------------------------------------------------------------------------ injected faults

MARK = -123.0  # the log-probability of a token whose batch makes the loss NaN


def marked(trajectory: Trajectory) -> Trajectory:
    [sample] = trajectory.samples
    logprobs = np.where(np.arange(len(sample)) == NUM_PROMPT, MARK, sample.behaviour_logprobs).astype(np.float32)
    return dataclasses.replace(trajectory, samples=(dataclasses.replace(sample, behaviour_logprobs=logprobs),))


def inject_fault(patch: pytest.MonkeyPatch) -> None:
    policy_loss = algorithms.ppo_policy_loss

    def faulty(logprobs: jax.Array, old: jax.Array, *args: Any, **keys: Any) -> Any:
        loss, stats = policy_loss(logprobs, old, *args, **keys)
        return loss * jnp.where(jnp.any(old == MARK), jnp.nan, 1.0), stats

    patch.setattr(algorithms, "ppo_policy_loss", faulty)


def faulty_components(base: Path, tmp_path: Path, **keys: Any) -> tuple[Components, list[Trajectory], Scores]:
    """Four updates of one row each; the second question's first trajectory is the faulty one."""
    short = {"rollout__max_length": 64, "rl__row_length": 64, "rl__batch_rows": 1, "rl__algorithm": "rloo",
             "rl__kl__coef": 0.0, "rl__warmup": 0.0}  # fmt: skip
    config = tiny_run.config(tmp_path, base, **short | keys)
    components = Components(config, config.run_directory, console=Console(file=io.StringIO(), width=1000))
    trajectories = [written(components, q, i, 3) for q in "xy" for i in (0, 1)]  # 33 tokens each
    trajectories[2] = marked(trajectories[2])
    rewards = [np.asarray(r, np.float32) for r in ([0, 0, 2], [0, 0, 0], [1, 0, 2], [0, 1, 0])]
    return components, trajectories, Scores(rewards, np.zeros((4, 3), np.float32), {}, {})


def on_host(tree: Any) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(tree)]


def test_a_step_of_nan_is_named_kept_and_replayed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    components, trajectories, scores = faulty_components(base, tmp_path)
    with monkeypatch.context() as patch:
        inject_fault(patch)
        trainer = RLTrainer(components)
        with pytest.raises(
            UserError, match=r"RL iteration 0, update \d of 4 \(batch \d\): .* finite; got nan and nan; kept"
        ):
            trainer.update(trajectories, scores)
        before = on_host(trainer.state.params)
        assert all(np.isfinite(x).all() for x in before)
        [path] = (components.run_dir / "checkpoints").glob("bad_step_*.npz")
        assert (np.load(path)["batch.behaviour_logprobs"] == MARK).any()
        replayed = RLTrainer(components).replay(path)
        assert math.isnan(replayed["loss"]) and math.isfinite(replayed["entropy"])
    sound = RLTrainer(components)  # the fault is repaired
    replayed = sound.replay(path)
    assert math.isfinite(replayed["loss"]) and replayed["grad_norm"] > 0
    state, _ = Checkpoints(path.with_suffix("")).restore(trainer.state)
    np.testing.assert_equal(on_host(state.params), before)


@pytest.mark.parametrize("nonfinite", ["skip", "rollback"])
def test_a_step_of_nan_is_skipped_or_rolled_back(
    nonfinite: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, trajectories, scores = faulty_components(
        base, tmp_path, guards__nonfinite=nonfinite, guards__rollbacks=1
    )
    inject_fault(monkeypatch)
    trainer = RLTrainer(components)
    start = on_host(trainer.state.params)
    metrics = trainer.update(trajectories, scores)
    assert metrics["bad_steps"] == 1 and trainer.iteration == 1
    moved = not all(np.array_equal(a, b) for a, b in zip(on_host(trainer.state.params), start, strict=True))
    assert all(np.isfinite(x).all() for x in on_host(trainer.state))
    said = components.console.file.getvalue()  # type: ignore[attr-defined]
    if nonfinite == "skip":
        assert moved and math.isfinite(metrics["policy_loss"]) and "skipped" in said
        return
    assert not moved and "back to the state before iteration 0" in said
    with pytest.raises(UserError, match=r"rolled back 1 times before \(guards.rollbacks\)"):
        trainer.update(trajectories, scores)


def test_rewards_that_are_all_equal_move_nothing_and_are_told(base: Path, tmp_path: Path) -> None:
    keys = {"guards__equal_groups": 0.9, "guards__action": "rollback", "guards__rollbacks": 1}
    components, trajectories, scores = faulty_components(base, tmp_path, **keys)
    equal = dataclasses.replace(scores, rewards=[np.ones(3, np.float32)] * 4)
    trainer = RLTrainer(components)
    start = on_host(trainer.state.params)
    seen = {"trajectory_tokens": 20.0}
    metrics = trainer.update(trajectories, equal) | seen
    assert metrics["equal_groups"] == metrics["learnt_from"] == 1
    assert all(np.array_equal(a, b) for a, b in zip(on_host(trainer.state.params), start, strict=True))
    trainer.guards.check(metrics)
    trainer.save()
    assert trainer.checkpoints.latest is None  # what may have to be rolled back is not kept
    trainer.guard(trainer.update(trajectories, scores) | seen)
    trainer.save()
    good, kl = on_host(trainer.state.params), trainer.kl
    trainer.update(trajectories, scores)
    trainer.guard(metrics)  # it has collapsed
    assert trainer.guards.rollbacks == 1 and trainer.iteration == 3 and trainer.kl == kl
    np.testing.assert_equal(on_host(trainer.state.params), good)
    with pytest.raises(UserError, match=r"RL iteration 2: equal_groups must be at most 0.9 .*; rolled back 1 times"):
        trainer.guard(metrics)


def test_the_cold_start_ends_at_a_step_of_nan(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft_loss = steps.sft_loss

    def faulty(*args: Any, **keys: Any) -> Any:
        loss, metrics = sft_loss(*args, **keys)
        return loss * jnp.nan, metrics | {"loss": loss * jnp.nan}

    monkeypatch.setattr(steps, "sft_loss", faulty)
    with pytest.raises(UserError, match=r"cold start, step 0: loss and gradient norm must be finite; got nan and nan"):
        tiny_run.train(tmp_path, base, phases="[index, sft]")
    [path] = (tmp_path / "run" / "checkpoints").glob("bad_step_sft_0.npz")
    assert {"tokens", "positions", "segment_ids", "loss_mask"} == set(np.load(path).files)


def test_rows_that_do_not_divide_by_the_devices_are_told_of() -> None:
    """Eight devices, four of data and fsdp."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    config = Config().replace(sft=SFTConfig(batch_rows=6), rl=RLConfig(batch_rows=8), rollout=RolloutConfig(slots=10))
    told = {phase: undivided(config, mesh, mesh, phase) for phase in ("index", "sft", "rl", "eval")}
    assert told == {"index": [], "sft": ["sft.batch_rows=6"], "rl": ["rollout.slots=10"], "eval": ["rollout.slots=10"]}
    of_one = make_mesh(MeshConfig(tensor=8))
    assert not any(undivided(config, of_one, of_one, phase) for phase in told)
