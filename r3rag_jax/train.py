"""Train and evaluate a search agent: `python -m r3rag_jax.train --config configs/quickstart.yaml [key=value …]`.

Runs the configured phases in order; the same command again resumes where it stopped.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from r3rag_jax import learner
from r3rag_jax.batch import fill_fraction, minibatches
from r3rag_jax.checkpoint import Checkpoints
from r3rag_jax.config import Config
from r3rag_jax.configio import parse_args
from r3rag_jax.data.qa import trajectory_to_dict
from r3rag_jax.data.sft import SFTBatches, SFTSample
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluator import fingerprint, play_greedy, read_answers, summarise
from r3rag_jax.judges import judge_memory
from r3rag_jax.metrics import Bar, num_compiled
from r3rag_jax.models import lora
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.report import write_report
from r3rag_jax.rewards.score import Scores, learnable, score
from r3rag_jax.rl.advantages import group_baseline
from r3rag_jax.rl.distribution import Truncation
from r3rag_jax.rollout import Job
from r3rag_jax.sampler.memory import MemoryPlan, bytes_per_device, plan
from r3rag_jax.session import Session, barrier, open_run, use_compile_cache
from r3rag_jax.sharding import put_batch, start_distributed, tree_shardings
from r3rag_jax.transcript import teacher_samples
from r3rag_jax.types import Question, Status, TrainBatch, Trajectory
from r3rag_jax.view import groups_table, results_table


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse_args(argv, prog="python -m r3rag_jax.train", description=(__doc__ or "").splitlines()[0])
    start_distributed(config.mesh)
    use_compile_cache()
    run(config)
    return 0


def run(config: Config, console: Console | None = None) -> Session:
    """All phases of the configuration; finished ones are skipped."""
    session = Session(config, config.run_directory, console=console)
    say = session.console.print
    plans = {name: plan_memory(session, name) for name in config.phases if is_ahead(session, name)}
    for planned in itertools.chain(*plans.values()):
        planned.check()  # before there is a directory, so that the same name can be had with other settings
    open_run(config)
    phases = {"index": index_phase, "sft": sft_phase, "rl": rl_phase, "eval": eval_phase}
    did_work = False
    for name in config.phases:
        started = time.monotonic()
        for planned in plans.get(name, ()):
            say(f"[dim]memory of {name}: {planned}[/]", highlight=False)
        if phases[name](session):
            say(f"[green]✓[/] {name}  {time.monotonic() - started:.0f} s", highlight=False)
            did_work = True
        else:
            say(f"[dim]✓ {name}  done before[/]", highlight=False)
    if jax.process_index() == 0:
        evals = load_evals(session)
        if evals:
            say(results_table(evals))
            say(groups_table(evals))
        say(f"{'Report' if did_work else 'All is done. Report'}: {write_report(session.run_dir)}", highlight=False)
    return session


# ----------------------------------------------------------------------------------------- memory


def is_ahead(session: Session, phase: str) -> bool:
    """Whether the phase has a policy on the devices and is still to be done."""
    if phase == "eval":
        return not session.config.rollout.server
    return phase != "index" and not session.policy_dir(phase).exists()


def plan_memory(session: Session, phase: str) -> list[MemoryPlan]:
    """What the phase keeps on each device: what it starts from, what it trains, the sampler's cache.

    Two plans where the sampler has devices of its own.
    """
    config, mesh = session.config, session.mesh
    session.codec  # noqa: B018  # a tokenizer without the protocol's tags is told of first
    shapes = nnx.split(nnx.eval_shape(session.new_decoder))[1]

    def size(tree: Any) -> int:
        return bytes_per_device(tree, tree_shardings(mesh, tree, PARAM_AXES))

    def trained() -> Any:
        policy = session.trainable_policy(shapes_to_zeros(shapes))
        if phase == "sft":
            return policy.params, learner.sft_optimizer(config.sft, 1).init(policy.params)
        params = {"policy": policy.params}
        if config.rl.critic != "none":
            whole = lora.join(policy.graphdef, policy.params, policy.frozen)
            params["critic"] = lora.Parts.of(learner.new_critic(whole, config.rl.critic), config.lora).params
        return params, learner.rl_optimizer(config.rl).init(params)

    parts = {"weights" if phase == "eval" else "start" if phase == "sft" else "reference": size(shapes)}
    if (phase == "rl" and config.rewards.needs_judge) or (phase == "eval" and config.eval.judge):
        parts |= judge_memory(config.judge, mesh)
    if phase != "eval":
        params, optimizer = jax.eval_shape(trained)
        parts |= {"trained": size(params), "optimizer": size(optimizer)}
        if phase == "rl" and config.lora.rank:
            parts["merged"] = size(shapes)
    if phase == "sft":
        return [plan(mesh, parts)]
    rollout, sampler_mesh = config.rollout, session.sampler_mesh
    own = parts
    if sampler_mesh is not mesh:
        own = {"weights": bytes_per_device(shapes, tree_shardings(sampler_mesh, shapes, PARAM_AXES))}
    elif phase == "rl" and config.rl.ahead:
        own = parts | {"weights ahead": size(shapes)}
    sampler = plan(
        sampler_mesh, own, session.decoder_config, slots=rollout.slots, max_length=rollout.max_length,
        dtype=session.cache_dtype,
    )  # fmt: skip
    return [sampler] if sampler_mesh is mesh else [plan(mesh, parts), sampler]


def shapes_to_zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


# ------------------------------------------------------------------------------------------ index


def index_phase(session: Session) -> bool:
    """World (where embedded) and index."""
    if (session.index_dir / "fingerprint.json").exists():
        return False
    session.write_data()
    session.console.print(f"{len(session.retriever.passages)} passages indexed", highlight=False)
    return True


# -------------------------------------------------------------------------------------------- sft


def sft_phase(session: Session) -> bool:
    """Cold start: next-token prediction of the teacher's steps."""
    config = session.config.sft
    if session.policy_dir("sft").exists():
        return False
    written = [sample for t in session.trajectories() for sample in teacher_samples(session.codec, t)]
    samples = [SFTSample(sample.ids, sample.loss_mask) for sample in written]
    batches = SFTBatches(samples, row_length=config.row_length, batch_rows=config.batch_rows,
                         epochs=config.epochs, seed=session.config.seed)  # fmt: skip
    tx = learner.sft_optimizer(config, batches.num_steps)
    policy = session.trainable_policy(session.base_params())
    state = learner.init_state(session.mesh, policy.params, tx)
    checkpoints = Checkpoints(session.run_dir, "sft")
    if checkpoints.latest is not None:
        state, note = checkpoints.restore(state)
        batches.set_state(note["batches"])
    session.log.rewind("sft", batches.step)
    step = learner.make_sft_step(session.mesh, policy.graphdef, tx, session.config.model, state)
    bar = Bar("cold start", batches.num_steps, console=session.console, live=session.config.log.progress,
              done=batches.step)  # fmt: skip
    with bar:
        while batches.step < batches.num_steps:
            started, number = time.monotonic(), batches.step
            batch = next(batches)
            state, metrics = step(state, put_batch(session.mesh, batch), policy.frozen)
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            numbers["tokens_per_s"] = float(np.sum(batch.segment_ids > 0)) / (time.monotonic() - started)
            session.log.write("sft", number, numbers)
            bar.advance(**{name: numbers[name] for name in ("loss", "accuracy", "tokens_per_s")})
            if batches.step % config.checkpoint_every == 0 and batches.step < batches.num_steps:
                checkpoints.save(batches.step, state, {"batches": batches.get_state()})
    session.save_policy("sft", jax.jit(lora.merge, static_argnums=0)(policy.graphdef, state.params, policy.frozen))
    checkpoints.close()
    return True


# --------------------------------------------------------------------------------------------- rl


def rl_phase(session: Session) -> bool:
    """PPO against the live retriever, from the cold start (or the base where there is none)."""
    config = session.config.rl
    if session.policy_dir("rl").exists():
        return False
    trainer = PPO(session)
    rewind_trajectories(session, trainer.iteration)
    rollouts, dev = Rollouts(session), session.questions("dev")
    judge = session.judge if session.config.rewards.needs_judge else None
    bar = Bar("RL", config.iterations, console=session.console, live=session.config.log.progress,
              done=trainer.iteration)  # fmt: skip

    def is_at(number: int, every: int) -> bool:
        return number % every == 0

    with bar, rollouts:
        while trainer.iteration < config.iterations:
            started, number, compiled = time.monotonic(), trainer.iteration, num_compiled()
            trajectories = rollouts.of(number, trainer.policy_params)
            following = number + 1
            # Not across a checkpoint, which a run may resume from, nor an evaluation, which takes the sampler itself.
            is_free = not (is_at(following, config.checkpoint_every) or (dev and is_at(following, config.eval_every)))
            if config.ahead and is_free and following < config.iterations:
                rollouts.start(following, trainer.policy_params)
            scores = score(trajectories, session.config.rewards, session.retriever.encoder,
                           max_steps=session.config.rollout.max_steps, judge=judge)  # fmt: skip
            metrics = rollout_metrics(trajectories, scores) | {"rollout_s": time.monotonic() - started}
            trajectories, scores = learnable(trajectories, scores)
            metrics |= trainer.update(trajectories, scores)
            if dev and is_at(trainer.iteration, config.eval_every):
                played = play_greedy(session.roller(), session.to_sampler(trainer.policy_params), dev)
                metrics["dev_em"] = summarise("dev", played, {})["groups"]["all"]["em"] / 100
            tokens = sum(len(sample) for trajectory in trajectories for sample in trajectory.samples)
            metrics["tokens_per_s"] = tokens / (time.monotonic() - started)
            metrics["num_compiled"] = num_compiled() - compiled
            session.log.write("rl", number, metrics)
            keep_trajectories(session, trajectories, scores, number)
            bar.advance(reward=metrics["reward"], em=100 * metrics["em"], tokens_per_s=metrics["tokens_per_s"])
            if is_at(trainer.iteration, config.checkpoint_every) and trainer.iteration < config.iterations:
                trainer.save()
    session.save_policy("rl", trainer.policy_params)
    trainer.checkpoints.close()
    return True


class Rollouts:
    """The trajectories of each iteration, sampled when they are asked for or, with `rl.ahead`, in a thread before.

    What is sampled ahead has the policy before the update beside it, so the ratios of PPO correct for one update more:
    they are to the log-probabilities that were recorded. Weights change without a new compilation.
    """

    def __init__(self, session: Session):
        mesh = session.sampler_mesh
        if session.config.rl.ahead and mesh is session.mesh and mesh.size > 1:
            raise UserError(
                "rl.ahead must have one device, or mesh.sampler_devices of its own: two threads cannot launch programs "
                f"on the same {mesh.size} devices; got mesh.sampler_devices={session.config.mesh.sampler_devices}"
            )
        self._session, self._questions = session, session.questions("rl")
        self._roller = session.roller()
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[list[Trajectory]]] | None = None

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def of(self, iteration: int, params: Any) -> list[Trajectory]:
        """Those started for the iteration, or else sampled now by the policy of `params`."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == iteration:
            return ahead[1].result()
        return self._play(iteration, self._session.to_sampler(params))

    def start(self, iteration: int, params: Any) -> None:
        """Sample the iteration's in a thread; `params` may be donated as soon as this returns."""
        if self._session.sampler_mesh is self._session.mesh:
            own = jax.tree.map(jnp.copy, params)
        else:
            own = self._session.to_sampler(params)
        self._ahead = iteration, self._thread.submit(self._play, iteration, own)

    def _play(self, iteration: int, params: Any) -> list[Trajectory]:
        return self._roller.play(params, iteration_jobs(self._session.config, self._questions, iteration))


class PPO:
    """The learner of the RL phase: policy, critic, frozen reference, optimizer; resumes by itself."""

    def __init__(self, session: Session):
        self._session, self._config = session, session.config.rl
        start = session.phase_params("sft") if session.policy_dir("sft").exists() else session.base_params()
        self._ref_params = start
        parts = {"policy": session.trainable_policy(start)}
        if self._config.critic != "none":
            policy = parts["policy"]
            critic = learner.new_critic(lora.join(policy.graphdef, policy.params, policy.frozen), self._config.critic)
            parts["critic"] = lora.Parts.of(critic, session.config.lora)
        graphdefs = {name: part.graphdef for name, part in parts.items()}
        self._frozen = {name: part.frozen for name, part in parts.items()}
        self._merge = jax.jit(functools.partial(lora.merge, parts["policy"].graphdef))
        tx = learner.rl_optimizer(self._config)
        self.state = learner.init_state(session.mesh, {name: part.params for name, part in parts.items()}, tx)
        self.iteration = 0
        self.checkpoints = Checkpoints(session.run_dir, "rl")
        if self.checkpoints.latest is not None:
            self.state, note = self.checkpoints.restore(self.state)
            self.iteration = note["iteration"]
        session.log.rewind("rl", self.iteration)
        model, truncation = session.config.model, Truncation.of(session.config.rollout)
        self._score = learner.make_scorer(session.mesh, graphdefs, session.graphdef, model, self._config, truncation)
        self._step = learner.make_rl_step(session.mesh, graphdefs, tx, model, self._config, self.state, truncation)

    @property
    def policy_params(self) -> Any:
        """What rollouts and export take: today's policy, its adapters merged."""
        trained, frozen = self.state.params["policy"], self._frozen["policy"]
        return trained if frozen is None else self._merge(trained, frozen)

    def save(self) -> None:
        self.checkpoints.save(self.iteration, self.state, {"iteration": self.iteration})

    def update(self, trajectories: Sequence[Trajectory], scores: Scores) -> dict[str, float]:
        """One PPO iteration: reference and values, advantages, then an epoch or more of clipped updates."""
        config, mesh = self._config, self._session.mesh
        rng = np.random.default_rng((self._session.config.seed, self.iteration))
        rewards, played = scores.rewards, len(trajectories)
        credit = config.credit
        if config.baseline == "group":
            discount = config.step_discount if credit == "trajectory" else 0.0
            trajectories, rewards = relative_to_group(trajectories, rewards, discount)
            credit = "step"  # of what is still to come each step has been credited with its share
        host = minibatches(trajectories, rewards, row_length=config.row_length,
                           batch_rows=config.batch_rows, credit=credit, rng=rng)  # fmt: skip
        batches: list[TrainBatch] = [put_batch(mesh, batch) for batch in host]
        scored = [self._score(self.state.params, self._ref_params, batch, self._frozen) for batch in batches]
        targets, stats = learner.whiten_all(
            [t for t, _ in scored], [b.loss_mask for b in batches], config.negative_weight
        )
        logs = [metrics for _, metrics in scored]
        order = [i for _ in range(config.epochs) for i in rng.permutation(len(batches))]
        for number, i in enumerate(order):
            progress = (self.iteration + (number + 1) / len(order)) / config.iterations
            lr_scale = learner.schedule(progress, config.warmup, 0.1)
            self.state, metrics = self._step(self.state, batches[i], targets[i], lr_scale, self._frozen)
            sampler_gap = metrics.pop("sampler_gap")
            logs.append(metrics | ({} if number else {"sampler_gap": sampler_gap}))  # later the policy has moved
        self.iteration += 1
        values: dict[str, list[float]] = {}
        for metrics in [*jax.device_get(logs), jax.device_get(stats)]:
            for name, value in metrics.items():
                values.setdefault(name, []).append(float(value))
        means = {name: float(np.mean(v)) for name, v in values.items()}
        means["fill"] = float(np.mean([fill_fraction(batch) for batch in host]))
        return means | {"learnt_from": len(trajectories) / played}


def relative_to_group(
    trajectories: Sequence[Trajectory], rewards: Sequence[np.ndarray], discount: float
) -> tuple[list[Trajectory], list[np.ndarray]]:
    """Trajectories to learn from, and the return of each of their steps, counted from the group baseline.

    G_k = r_k + discount G_(k+1), less what the question's other trajectories return from step k on. Where all
    trajectories of a question earned the same step by step there is nothing to learn: they are left out, unless that
    leaves none (the dynamic sampling of DAPO, arXiv 2503.14476, without drawing more).
    """
    numbers = {id: number for number, id in enumerate(dict.fromkeys(t.question.id for t in trajectories))}
    groups = np.asarray([numbers[t.question.id] for t in trajectories])
    table = np.zeros((len(rewards), max(map(len, rewards))), np.float32)
    mask = np.zeros_like(table, bool)
    for row, r in enumerate(rewards):
        table[row, : len(r)], mask[row, : len(r)] = r, True
    returns = table.copy()
    for step in range(table.shape[1] - 2, -1, -1):
        returns[:, step] += discount * returns[:, step + 1]
    relative = returns - np.asarray(group_baseline(returns, mask, groups, num_groups=len(trajectories)))
    differs = np.asarray([np.ptp(table[groups == group], axis=0).max() > 1e-6 for group in groups])
    kept = np.flatnonzero(differs if differs.any() else np.ones_like(differs)).tolist()
    return [trajectories[i] for i in kept], [relative[i, : len(rewards[i])] for i in kept]


def iteration_jobs(config: Config, questions: Sequence[Question], iteration: int) -> list[Job]:
    """The jobs of an iteration, a function of seed and iteration alone: resuming needs no data position.

    Questions come in a new random order each time through all of them.
    """
    rl, rollout = config.rl, config.rollout
    jobs = []
    for place in range(iteration * rl.questions, (iteration + 1) * rl.questions):
        epoch, at = divmod(place, len(questions))
        order = np.random.default_rng((config.seed, epoch)).permutation(len(questions))
        for sample in range(rollout.samples):
            temperature = rollout.temperatures[sample % len(rollout.temperatures)]
            jobs.append(Job(questions[order[at]], sample, temperature, seed=config.seed * 1_000_003 + iteration))
    return jobs


def rollout_metrics(trajectories: Sequence[Trajectory], scores: Scores) -> dict[str, float]:
    """What the trajectories of an iteration look like."""
    status = np.asarray([t.status for t in trajectories])
    is_valid = scores.is_valid
    parts = {f"reward_{name}": values[is_valid] for name, values in scores.parts.items()}
    asking = [[i, k] for i, t in enumerate(trajectories) for k, step in enumerate(t.steps) if step.query is not None]
    parts["relevance"] = scores.process[tuple(np.reshape(asking, (-1, 2)).astype(int).T)]
    parts |= {"acc": scores.answers["acc"]} if "acc" in scores.answers else {}
    return {
        "reward": _known_mean(np.asarray([r.sum() for r in scores.rewards])),
        **{name: _known_mean(values) for name, values in parts.items()},
        **(scores.verdicts.metrics | {"left_out": 1 - is_valid.mean()} if scores.verdicts is not None else {}),
        "em": float(scores.answers["em"].mean()),
        "f1": float(scores.answers["f1"].mean()),
        "no_answer_rate": float(np.mean(status == Status.NO_ANSWER)),
        "format_error_rate": float(np.mean(status == Status.FORMAT_ERROR)),
        "mean_retrievals": float(np.mean([t.num_retrievals for t in trajectories])),
    }


def _known_mean(values: np.ndarray) -> float:
    """Of what no failed judgement left open; 0 where there is nothing."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def keep_trajectories(session: Session, trajectories: Sequence[Trajectory], scores: Scores, iteration: int) -> None:
    """Append a few trajectories of the iteration to `trajectories/rl.jsonl`."""
    count = session.config.log.trajectories
    if jax.process_index() != 0 or count == 0:
        return
    path = session.run_dir / "trajectories" / "rl.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for i in range(0, len(trajectories), max(1, len(trajectories) // count)):
            row = trajectory_to_dict(trajectories[i])
            row |= {"reward": float(scores.rewards[i].sum()), "iteration": iteration}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rewind_trajectories(session: Session, iteration: int) -> None:
    """Forget the kept trajectories of iterations that a resumed phase plays again, and a half-written line."""
    path = session.run_dir / "trajectories" / "rl.jsonl"
    if jax.process_index() == 0 and path.exists():
        lines = path.read_text().split("\n")[:-1]
        path.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["iteration"] < iteration))


# ------------------------------------------------------------------------------------------- eval


def eval_phase(session: Session) -> bool:
    """Baselines, cold start and R3-RAG on the test questions."""
    questions = session.questions("test")[: session.config.eval.max_questions or None]
    mark = fingerprint(questions, index=session.retriever.fingerprint, top_k=session.config.retrieval.top_k,
                       **session.sampling_mark(), **session.judge_mark())  # fmt: skip
    did_work = False
    for system in session.config.eval.systems:
        path = session.run_dir / "eval" / f"{system}.json"
        if path.exists() and json.loads(path.read_text())["fingerprint"] == mark:
            continue
        did_work = True
        bar = Bar(f"eval {system}", len(questions), console=session.console, live=session.config.log.progress)
        with bar:
            trajectories = evaluate_system(session, system, questions, bar)
        write_eval(session, system, trajectories, mark)
    barrier("eval")
    return did_work


def evaluate_system(session: Session, system: str, questions: Sequence[Question], bar: Bar) -> list[Trajectory]:
    """Trajectories of one system of `eval.systems` on the questions."""

    def on_done(trajectory: Trajectory) -> None:
        bar.advance(retrievals=trajectory.num_retrievals)

    if system in ("closed_book", "oneshot_rag"):
        retriever = session.retriever if system == "oneshot_rag" else None
        params = session.sampling_params(session.base_params)
        return read_answers(session.reading_engine(), session.tokenizer, params, questions, retriever,
                            session.config.retrieval.oneshot_top_k, on_done,
                            chat=session.config.eval.prompt == "chat")  # fmt: skip
    phase = {"cold_start": "sft", "r3rag": "rl"}[system]
    if not session.policy_dir(phase).exists() and not session.config.rollout.server:
        raise UserError(f"eval.systems names {system}, but phase {phase} of {session.run_dir} has not finished")
    params = session.sampling_params(lambda: session.phase_params(phase))
    return play_greedy(session.roller(), params, questions, on_done)


def write_eval(session: Session, system: str, trajectories: Sequence[Trajectory], mark: dict[str, Any]) -> None:
    """Trajectories first: a judge may fail. Process 0 alone writes."""
    is_writer = jax.process_index() == 0
    if is_writer:
        for name in ("eval", "trajectories"):
            (session.run_dir / name).mkdir(exist_ok=True)
        lines = (json.dumps(trajectory_to_dict(t), ensure_ascii=False) for t in trajectories)
        (session.run_dir / "trajectories" / f"{system}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    summary = summarise(system, trajectories, mark, session.judge if session.config.eval.judge else None)
    if is_writer:
        (session.run_dir / "eval" / f"{system}.json").write_text(json.dumps(summary, indent=2) + "\n")


def load_evals(session: Session) -> list[dict[str, Any]]:
    """The finished evaluations, in the configured order."""
    paths = [session.run_dir / "eval" / f"{system}.json" for system in session.config.eval.systems]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


if __name__ == "__main__":
    sys.exit(main())
