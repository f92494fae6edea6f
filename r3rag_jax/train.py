"""Train and evaluate a search agent: `python -m r3rag_jax.train --config configs/quickstart.yaml [key=value …]`.

Runs the configured phases in order; the same command again resumes where it stopped.
"""

from __future__ import annotations

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
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from r3rag_jax.components import Session, open_run
from r3rag_jax.config.loader import parse_args
from r3rag_jax.config.schema import Config
from r3rag_jax.data.qa import trajectory_to_dict
from r3rag_jax.data.sft import SFTBatches, SFTSample
from r3rag_jax.errors import UserError, main_guard
from r3rag_jax.evaluation.evaluator import fingerprint, play_greedy, read_answers, summarise
from r3rag_jax.models import lora
from r3rag_jax.models.decoder import PARAM_AXES
from r3rag_jax.parallel.mesh import traced_on
from r3rag_jax.parallel.processes import barrier, start_distributed
from r3rag_jax.parallel.shardings import batch_ways, device_put_batch, tree_shardings
from r3rag_jax.report import write_report
from r3rag_jax.reporting.rendering import groups_table, results_table
from r3rag_jax.rewards.judge.factory import judge_memory
from r3rag_jax.rewards.scorer import Scores, learnable, score
from r3rag_jax.rollout.rollout import Job
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.checkpoints import Checkpoints, save_arrays
from r3rag_jax.run.progress import Bar, num_compiled
from r3rag_jax.sampler.cached_decoder import CachedDecoder
from r3rag_jax.sampler.kernels.cpu import operations as cpu_kernels
from r3rag_jax.sampler.memory import MemoryPlan, bytes_per_device, plan
from r3rag_jax.text.transcript import teacher_samples
from r3rag_jax.training import learner, optimizer
from r3rag_jax.training.guards import is_finite
from r3rag_jax.training.prefix_tree import share_prefixes
from r3rag_jax.training.trainer import RLTrainer, equal_groups, number_groups
from r3rag_jax.types import Question, SFTBatch, Status, Trajectory


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
    if plans and traced_on(session.sampler_mesh, cpu_kernels.are_missing)():
        say("[yellow]no C++ compiler that works (c++, g++, clang++ or $CXX): sampling takes some twice as long[/]")
    for name in config.phases:
        started = time.monotonic()
        for planned in plans.get(name, ()):
            say(f"[dim]memory of {name}: {planned}[/]", highlight=False)
        for key in undivided(config, session.mesh, session.sampler_mesh, name) if name in plans else ():
            say(f"[yellow]{key} does not divide by the devices of data and fsdp: each computes all rows[/]")
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
            return policy.params, optimizer.sft_optimizer(config.sft, 1, config.model.moment_dtype).init(policy.params)
        params = {"policy": policy.params}
        if config.rl.has_critic:
            whole = lora.join(policy.graphdef, policy.params, policy.frozen)
            params["critic"] = lora.Parts.of(learner.new_critic(whole, config.rl.critic), config.lora).params
        return params, optimizer.rl_optimizer(config.rl, config.model.moment_dtype).init(params)

    parts = {"weights" if phase == "eval" else "start" if phase == "sft" else "reference": size(shapes)}
    if (phase == "rl" and config.rewards.needs_judge) or (phase == "eval" and config.eval.judge):
        parts |= judge_memory(config.judge, mesh)
    if phase != "eval":
        params, moments = jax.eval_shape(trained)
        parts |= {"trained": size(params), "optimizer": size(moments)}
        if phase == "rl" and config.lora.rank:
            parts["merged"] = size(shapes)
    if phase == "sft":
        return [plan(mesh, parts)]
    rollout, sampler_mesh = config.rollout, session.sampler_mesh
    policy = jax.eval_shape(lambda: CachedDecoder.of(session.new_decoder()))
    own = {"policy of rollouts": bytes_per_device(policy, policy.shardings(sampler_mesh, rollout.split_weights))}
    if sampler_mesh is mesh:
        own = parts | own
    else:
        own = {"weights": bytes_per_device(shapes, tree_shardings(sampler_mesh, shapes, PARAM_AXES))} | own
    sampler = plan(
        sampler_mesh, own, session.decoder_config, slots=rollout.slots, max_length=rollout.max_length,
        dtype=session.cache_dtype,
    )  # fmt: skip
    return [sampler] if sampler_mesh is mesh else [plan(mesh, parts), sampler]


def undivided(config: Config, mesh: Mesh, sampler_mesh: Mesh, phase: str) -> list[str]:
    """Settings of a phase by which devices work on the same rows instead of some each, as `key=value`."""
    batches = {"sft": ("sft.batch_rows", config.sft.batch_rows), "rl": ("rl.batch_rows", config.rl.batch_rows)}
    slots = ("rollout.slots", config.rollout.slots)
    asked = [(mesh, *batches[phase])] if phase in batches else []
    asked += [(sampler_mesh, *slots)] if phase in ("rl", "eval") and not config.rollout.server else []
    return [f"{key}={rows}" for on, key, rows in asked if on.size > on.shape["tensor"] and batch_ways(on, rows) == 1]


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
    written = [teacher_samples(session.codec, t) for t in session.trajectories()]
    if session.shares_prefixes:
        written = [share_prefixes(samples, config.row_length) for samples in written]
    samples = [SFTSample(s.ids, s.loss_mask, s.positions, s.branch_ids) for s in itertools.chain(*written)]
    batches = SFTBatches(samples, row_length=config.row_length, batch_rows=config.batch_rows,
                         epochs=config.epochs, seed=session.config.seed)  # fmt: skip
    tx = optimizer.sft_optimizer(config, batches.num_steps, session.config.model.moment_dtype)
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
            state, metrics = step(state, device_put_batch(session.mesh, batch), policy.frozen)
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not is_finite(numbers):
                report_bad_step(session, number, batch, numbers)
            numbers["tokens_per_s"] = float(np.sum(batch.segment_ids > 0)) / (time.monotonic() - started)
            session.log.write("sft", number, numbers)
            bar.advance(**{name: numbers[name] for name in ("loss", "accuracy", "tokens_per_s")})
            if batches.step % config.checkpoint_every == 0 and batches.step < batches.num_steps:
                checkpoints.save(batches.step, state, {"batches": batches.get_state()})
    session.save_policy("sft", jax.jit(lora.merge, static_argnums=0)(policy.graphdef, state.params, policy.frozen))
    checkpoints.close()
    return True


def report_bad_step(session: Session, number: int, batch: SFTBatch, numbers: dict[str, float]) -> None:
    """Keep the batch of an update that was none, and end the cold start or (`guards.nonfinite`) go on without it."""
    path = session.run_dir / "checkpoints" / f"bad_step_sft_{number}.npz"
    save_arrays(path, batch)
    told = (
        f"cold start, step {number}: loss and gradient norm must be finite; got {numbers['loss']} and "
        f"{numbers['grad_norm']}; its batch is kept: {path}"
    )
    if session.config.guards.nonfinite != "skip":
        raise UserError(told)
    session.console.print(f"[yellow]{escape(told)}; skipped[/]", highlight=False)


# --------------------------------------------------------------------------------------------- rl


def rl_phase(session: Session) -> bool:
    """Policy gradients against the live retriever, from the cold start (or the base where there is none)."""
    config = session.config.rl
    if session.policy_dir("rl").exists():
        return False
    trainer = RLTrainer(session)
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
            num_rollbacks = trainer.guards.rollbacks
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
            trainer.guard(metrics)
            if trainer.guards.rollbacks > num_rollbacks:
                rollouts.forget()
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
        self._ahead = iteration, self._thread.submit(self._play, iteration, self._session.to_sampler(params))

    def forget(self) -> None:
        """Leave what was started alone: it is of a policy that is no more."""
        if self._ahead is not None:
            self._ahead[1].result()
        self._ahead = None

    def _play(self, iteration: int, policy: CachedDecoder) -> list[Trajectory]:
        """With `rl.draws`, also those of questions drawn in the place of those that teach nothing."""
        config, session = self._session.config, self._session
        judge = session.judge if config.rewards.needs_judge else None
        trajectories = self._roller.play(policy, iteration_jobs(config, self._questions, iteration))
        for draw in range(1, config.rl.draws):
            scores = score(trajectories, config.rewards, session.retriever.encoder,
                           max_steps=config.rollout.max_steps, judge=judge)  # fmt: skip
            known, scores = learnable(trajectories, scores)
            groups = number_groups(known)
            is_equal = equal_groups(scores.rewards, groups, totals=config.rl.returns == "total")
            num_missing = config.rl.questions - len(np.unique(groups[~is_equal]))
            taken = {trajectory.question.id for trajectory in trajectories}
            jobs = more_jobs(config, self._questions, iteration, draw, num_missing, taken)
            if not jobs:
                break
            trajectories = trajectories + self._roller.play(policy, jobs)
        return trajectories


def iteration_jobs(config: Config, questions: Sequence[Question], iteration: int) -> list[Job]:
    """The jobs of an iteration, a function of seed and iteration alone: resuming needs no data position.

    Questions come in a new random order each time through all of them.
    """
    jobs = []
    for place in range(iteration * config.rl.questions, (iteration + 1) * config.rl.questions):
        epoch, at = divmod(place, len(questions))
        order = np.random.default_rng((config.seed, epoch)).permutation(len(questions))
        jobs += samples_of(config, questions[order[at]], iteration)
    return jobs


def more_jobs(
    config: Config, questions: Sequence[Question], iteration: int, draw: int, count: int, taken: set[str]
) -> list[Job]:
    """Jobs of `count` questions more for an iteration, drawn by chance from those that are not `taken`."""
    free = [question for question in questions if question.id not in taken]
    order = np.random.default_rng((config.seed, iteration, draw)).permutation(len(free))[: max(0, count)]
    return [job for at in order for job in samples_of(config, free[at], iteration)]


def samples_of(config: Config, question: Question, iteration: int) -> list[Job]:
    temperatures, seed = config.rollout.temperatures, config.seed * 1_000_003 + iteration
    return [Job(question, i, temperatures[i % len(temperatures)], seed=seed) for i in range(config.rollout.samples)]


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
        "repeated_query_rate": repeated_query_rate(trajectories),
        "trajectory_tokens": float(np.mean([t.num_policy_tokens for t in trajectories])),
        "mean_retrievals": float(np.mean([t.num_retrievals for t in trajectories])),
    }


def repeated_query_rate(trajectories: Sequence[Trajectory]) -> float:
    """Share of queries that the same trajectory has asked before, but for case and spaces; 0 without queries."""
    asked = [[" ".join(s.query.casefold().split()) for s in t.steps if s.query is not None] for t in trajectories]
    num_queries = sum(map(len, asked))
    return (num_queries - sum(len(set(queries)) for queries in asked)) / max(1, num_queries)


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
        policy = session.sampling_policy(session.base_params)
        return read_answers(session.reading_engine(), session.tokenizer, policy, questions, retriever,
                            session.config.retrieval.oneshot_top_k, on_done,
                            chat=session.config.eval.prompt == "chat")  # fmt: skip
    phase = {"cold_start": "sft", "r3rag": "rl"}[system]
    if not session.policy_dir(phase).exists() and not session.config.rollout.server:
        raise UserError(f"eval.systems names {system}, but phase {phase} of {session.run_dir} has not finished")
    policy = session.sampling_policy(lambda: session.phase_params(phase))
    return play_greedy(session.roller(), policy, questions, on_done)


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
