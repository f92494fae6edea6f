"""An iteration of RL compared with that of TRL's GRPOTrainer with a search tool, in one process.

    python benchmarks/iteration.py RUN [--questions 8 --samples 4] [key=value …]   RUN has a policy of the cold start

Both begin with the cold start's policy of RUN, a run with `rollout.protocol=tags`, and train LoRA adapters of its rank
on the same questions: samples at temperature 1 that search the run's index, exact match as TRL's reward, one pass of
GRPO over all of them without a KL term. TRL gets the protocol as a chat template: `<query> … </query>` is a tool
call, and what the tool returns is inserted as `<doc> … </doc>`. A turn ends at the same tokens, and after as many, as
a step does here; a trajectory has as many turns as steps. TRL generates with transformers: vLLM needs a GPU.

The first iteration compiles and is not measured. Then one of each is run in turn; figures are medians, the ratio is
their quotient. What was sampled is not the same, so the sizes of the trajectories are shown, too. Needs trl, peft,
datasets and torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from r3rag_jax.components import Components
from r3rag_jax.config import Config, load_config
from r3rag_jax.rewards.answer import answer_scores, encode_answers
from r3rag_jax.rollout.prefetch import Prefetcher
from r3rag_jax.run.caches import use_compile_cache
from r3rag_jax.run.stopwatch import Stopwatch
from r3rag_jax.text.protocols import TagsProtocol
from r3rag_jax.text.tokenizer import Tokenizer
from r3rag_jax.training.experience import IterationSampler
from r3rag_jax.training.rl import run_iteration
from r3rag_jax.training.trainer import RLTrainer
from r3rag_jax.types import Question

Figures = dict[str, float]
SECONDS = ("iteration", "rollouts", "rewards", "update")
SIZES = ("sampled tokens per trajectory", "searches per trajectory", "EM")
# What TRL's trainer reads: the user's message in the policy's own frame, and the protocol's tags around the rest.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{ before }}{{ message.content }}{{ after }}
{%- elif message.role == "tool" -%}
<doc> {{ message.content }} </doc>
{%- else -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<query> {{ call.function.name }}{% for name, value in call.function.arguments.items() %} {{ name }} {{ value }}
{%- endfor %} </query>
{%- endfor -%}
{%- endif -%}
{%- endfor -%}"""
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "{content}"}}}
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|im_start|>assistant\n", "</doc>"],
    "fields": {
        "tool_calls": {
            "open_pattern": "<query>", "close_pattern": "</query>", "repeats": True, "content": "text",
            "transform": CALL,
        },
        "content": {"close_pattern": "$", "content": "text"},
    },
}  # fmt: skip


class Ours:
    """Iterations of a run's RL phase, on a few of its questions."""

    def __init__(self, config: Config, folder: str, questions: int, console: Console):
        components = Components(config, folder, console)
        parts = components.rl_parts
        self.config, self.codec = config, components.codec
        self.parts = dataclasses.replace(parts, questions=list(parts.questions)[:questions], evaluate=None)
        self.trainer = RLTrainer(
            config, parts.policy, parts.mesh, parts.run, console,
            shares_prefixes=parts.shares_prefixes, provenance=parts.provenance,
        )  # fmt: skip
        self.scorer = parts.make_scorer(self.trainer.reference_params)
        sampler = IterationSampler(
            config, self.parts.questions, parts.env_factory, parts.retriever, self.scorer, parts.sampler_work
        )
        self.prefetcher: Prefetcher[Any, Any, Any] = Prefetcher(
            lambda params: parts.make_backend(lambda: params), sampler.run
        )

    def iterate(self) -> Figures:
        metrics, failure = run_iteration(self.config, self.parts, self.trainer, self.scorer, self.prefetcher)
        if failure is not None:
            raise failure
        return {
            "iteration": metrics["iteration_s"],
            "rollouts": metrics["rollout_wait_s"],
            "rewards": metrics["rollout_s"] - metrics["rollout_wait_s"],
            "update": metrics["update_s"],
            "sampled tokens per trajectory": metrics["trajectory_tokens"],
            "searches per trajectory": metrics["mean_retrievals"],
            "EM": 100 * metrics["em"],
        }


def train_trl(
    config: Config, ours: Ours, folder: str, dtype: str, batch: int, on_iteration: Callable[[Figures], None]
) -> None:
    """Train as many iterations as `config` says; after each, `on_iteration` gets its figures."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(os.cpu_count() or 1)  # PyTorch's default is one thread a core, where JAX has one a CPU
    policy, questions = Path(config.model.path), ours.parts.questions
    tokenizer, end_ids = peer_tokenizer(policy)

    def search(query: str) -> str:
        """Search Wikipedia.

        Args:
            query: what to search for.

        Returns:
            The passages found.
        """
        [hits] = ours.parts.retriever.search([query], config.retrieval.top_k)
        return "\n".join(ours.codec.shown(hit.passage) for hit in hits)

    def exact_match(prompts: Any, completions: Any, id: Any, **_: Any) -> list[float]:
        by_id = {question.id: question for question in questions}
        answers = [answer_of(completion[-1]["content"]) for completion in completions]
        return em_of(answers, [by_id[one] for one in id])

    class Timed(GRPOTrainer):
        watch = Stopwatch()

        def _generate(self, *args: Any) -> Any:
            with self.watch.measure("rollouts"):
                return super()._generate(*args)

        def _calculate_rewards(self, *args: Any) -> Any:
            with self.watch.measure("rewards"):
                return super()._calculate_rewards(*args)

    class Iterations(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.watch = Stopwatch()
            self.measured = trainer.watch.measure("iteration")
            self.measured.__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.measured.__exit__(None, None, None)
            seconds, metrics = trainer.watch.seconds, trainer._metrics["train"]
            figures = {name: seconds[name] for name in SECONDS if name in seconds}
            figures["update"] = figures["iteration"] - figures["rollouts"] - figures["rewards"]
            latest = {name: float(values[-1]) for name, values in metrics.items()}
            figures["sampled tokens per trajectory"] = latest["completions/mean_length"]
            figures["searches per trajectory"] = latest["tools/call_frequency"]
            figures["EM"] = 100 * latest["rewards/exact_match/mean"]
            on_iteration(figures)

    message = TagsProtocol().user_message
    rows = [{"prompt": [{"role": "user", "content": message(q.question)}], "id": q.id} for q in questions]
    trainer = Timed(
        model=str(policy),
        processing_class=tokenizer,
        reward_funcs=exact_match,
        tools=[search],
        train_dataset=Dataset.from_list(rows),
        callbacks=[Iterations()],
        peft_config=LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets),
            task_type="CAUSAL_LM",
        ),
        args=GRPOConfig(**grpo_settings(config, folder, dtype, batch, end_ids)),
    )  # fmt: skip
    trainer.eos_token_ids = end_ids
    trainer.train()


def grpo_settings(config: Config, folder: str, dtype: str, batch: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """TRL's settings of what `config` says; `batch` trajectories in a forward pass."""
    samples = config.rollout.samples
    return dict(
        output_dir=folder,
        max_steps=config.rl.iterations,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=config.rl.questions * samples // batch,
        num_generations=samples,
        max_completion_length=config.rollout.max_length,
        max_tool_calling_iterations=config.rollout.max_steps - 1,
        generation_kwargs={"max_new_tokens": config.rollout.max_new_tokens, "eos_token_id": end_ids},
        temperature=1.0,
        min_p=config.rollout.min_p or None,
        top_p=config.rollout.top_p,
        beta=0.0,
        learning_rate=config.rl.lr,
        bf16=dtype == "bfloat16",
        use_cpu=jax.default_backend() == "cpu",
        model_init_kwargs={"dtype": dtype},
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=config.seed,
    )


def peer_tokenizer(policy: Path) -> tuple[Any, list[int]]:
    """transformers' tokenizer, which writes and reads the protocol for TRL, and the ids that end a turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = chat_template(*Tokenizer(policy).frame_of_user_message())
    tokenizer.response_template = RESPONSE_TEMPLATE
    end_ids = tokenizer.convert_tokens_to_ids([*TagsProtocol.stop_tokens, tokenizer.eos_token])
    tokenizer.eos_token = "</query>"  # what TRL takes for the end of a turn, after which a tool's text follows
    return tokenizer, end_ids


def chat_template(before: str, after: str) -> str:
    """CHAT_TEMPLATE with what comes before and after a user's message."""
    return CHAT_TEMPLATE.replace("before", json.dumps(before)).replace("after", json.dumps(after))


def answer_of(text: str) -> str:
    return TagsProtocol().parse_step(text, 1).answer or ""


def em_of(answers: Sequence[str], questions: Sequence[Question]) -> list[float]:
    golds = [question.golden_answers for question in questions]
    return np.asarray(answer_scores(encode_answers(answers, golds))["em"]).tolist()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4, help="trajectories per question")
    parser.add_argument("--rounds", type=int, default=3, help="measured iterations")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of both")
    parser.add_argument("--batch", type=int, default=4, help="trajectories in a forward pass of TRL's update")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys that differ from RUN's; TRL takes those of `rollout`, `lora` and `rl.lr`, too",
    )
    args = parser.parse_intermixed_args(argv)
    use_compile_cache()
    console = Console()
    trained = load_config(args.run / "config.yaml", [])
    index = trained.retrieval.index_dir or args.run / "index"
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            args.run / "config.yaml",
            [
                "phases=rl", f"run_dir={folder}", f"model.path={args.run / 'policy' / 'sft'}", "rl.algorithm=grpo",
                f"retrieval.index_dir={index}", f"rl.questions={args.questions}", "rl.kl.coef=0",
                f"rollout.samples={args.samples}", f"rollout.slots={args.questions * args.samples}",
                f"rl.iterations={args.rounds + 1}", "rl.drop_zero_variance=false",
                "rollout.temperatures=[1]", "rl.negative_weight=1", "rl.step_discount=1", f"model.dtype={args.dtype}",
                "log.trajectories=0", "log.progress=false", "data.sft=", "data.refresh_retrieved=false",
                "data.leakage=off", *args.overrides,
            ],
        )  # fmt: skip
        ours, found = Ours(config, f"{folder}/ours", args.questions, console), defaultdict[str, list[Figures]](list)

        def on_iteration(figures: Figures) -> None:
            found["TRL"].append(figures)
            found["r3rag_jax"].append(ours.iterate())
            seconds = " and ".join(f"{one[-1]['iteration']:.0f} s" for one in found.values())
            console.print(f"iteration {len(found['TRL']) - 1}: {seconds}", highlight=False)

        with ours.prefetcher:
            train_trl(config, ours, f"{folder}/trl", args.dtype, args.batch, on_iteration)
    medians = {
        name: {key: statistics.median(one[key] for one in figures[1:]) for key in figures[0]}
        for name, figures in found.items()
    }
    title = f"{args.questions} questions x {args.samples} trajectories, {args.dtype}"
    table = Table("", "TRL", "r3rag_jax", "ratio", title=title)
    for key in (*SECONDS, *SIZES):
        theirs, our = medians["TRL"][key], medians["r3rag_jax"][key]
        unit, ratio = (", s", f"{theirs / our:.2f}") if key in SECONDS else ("", "")
        table.add_row(f"{key}{unit}", f"{theirs:.2f}", f"{our:.2f}", ratio)
    console.print(table)


if __name__ == "__main__":
    main()
