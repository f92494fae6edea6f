"""The whole configuration of an experiment: top-level keys, all sections, and relations between sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import field_validator, model_validator

from r3rag_jax.config.baselines import BaselinesConfig
from r3rag_jax.config.coldstart import ColdStartConfig
from r3rag_jax.config.data import FILES_READ, DataConfig
from r3rag_jax.config.evaluation import BASE_SYSTEMS, EvalConfig
from r3rag_jax.config.guards import GuardsConfig
from r3rag_jax.config.judge import JudgeConfig
from r3rag_jax.config.log import LogConfig
from r3rag_jax.config.mesh import MeshConfig
from r3rag_jax.config.model import LoraConfig, ModelConfig
from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.config.rewards import RewardConfig
from r3rag_jax.config.rl import RLConfig
from r3rag_jax.config.rollout import RolloutConfig
from r3rag_jax.config.section import Section, check_names, key, require, section
from r3rag_jax.config.sft import SFTConfig
from r3rag_jax.config.world import MAX_SEED, WorldConfig

PHASES = ("index", "sft", "rl", "eval")


class Config(Section):
    """A whole experiment."""

    name: str = key("run", "name of the run")
    run_dir: str = key("", "run directory; empty: runs/<name>", "path or gs://BUCKET/…")
    stop_s: float = key(
        300.0, "after SIGTERM or Ctrl-C, the most that the step under way and its checkpoint may take", "seconds", gt=0
    )
    seed: int = key(0, "seed of initialisation, data order and sampling", ge=0, le=MAX_SEED)
    budget: str = key("", "which of the recipe's `budgets` are used, `a` or `a,b`; empty: the recipe without any")
    phases: tuple[str, ...] = key(PHASES, "phases that are run, in this order")
    world: WorldConfig = section(WorldConfig())
    data: DataConfig = section(DataConfig())
    model: ModelConfig = section(ModelConfig())
    lora: LoraConfig = section(LoraConfig())
    retrieval: RetrievalConfig = section(RetrievalConfig())
    rollout: RolloutConfig = section(RolloutConfig())
    sft: SFTConfig = section(SFTConfig())
    rl: RLConfig = section(RLConfig())
    rewards: RewardConfig = section(RewardConfig())
    guards: GuardsConfig = section(GuardsConfig())
    judge: JudgeConfig = section(JudgeConfig())
    coldstart: ColdStartConfig = section(ColdStartConfig())
    baselines: BaselinesConfig = section(BaselinesConfig())
    eval: EvalConfig = section(EvalConfig())
    mesh: MeshConfig = section(MeshConfig())
    log: LogConfig = section(LogConfig())

    @property
    def run_directory(self) -> Path | str:
        """`run_dir`, or `runs/<name>` under the working directory; a URL, `gs://…`, is not a path but that text."""
        return self.run_dir if "://" in self.run_dir else Path(self.run_dir or f"runs/{self.name}")

    @property
    def coldstart_directory(self) -> Path:
        """Where `python -m r3rag_jax.coldstart` writes: `coldstart.dir`, or `runs/<name>-coldstart`."""
        return Path(self.coldstart.dir or f"runs/{self.name}-coldstart")

    @field_validator("run_dir")
    @classmethod
    def _check_run_dir(cls, run_dir: str) -> str:
        if "\0" in run_dir:
            raise ValueError(f"must not hold the character NUL; got {run_dir!r}")
        if "://" in run_dir and re.fullmatch(r"gs://[^/]+(/[^/]+)+/?", run_dir) is None:
            raise ValueError(f"must be a path, or gs://BUCKET/… with a folder of the bucket; got {run_dir!r}")
        return run_dir

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if re.fullmatch(r"[\w][\w.+-]*", name) is None:
            raise ValueError(f"must be one directory name of letters, digits and _.+-, not led by a sign; got {name!r}")
        return name

    @field_validator("phases")
    @classmethod
    def _check_phases(cls, phases: tuple[str, ...]) -> tuple[str, ...]:
        check_names(phases, PHASES)
        if list(phases) != sorted(phases, key=PHASES.index):
            raise ValueError(f"must come in the order {', '.join(PHASES)}; got {', '.join(phases)}")
        return phases

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        """Every phase has the file that it reads."""
        for phase, (name, *_) in FILES_READ.items():
            require(
                self.data.source != "files" or phase not in self.phases or getattr(self.data, name) != "",
                f"data.{name} must be given when data.source is files and phases has {phase}; got none",
                f"data.{name}",
                "data.source",
            )
        return self

    @model_validator(mode="after")
    def _check_rl(self) -> Self:
        require(
            "rl" not in self.phases or self.rl.row_length >= self.rollout.max_length,
            "rl.row_length must be at least rollout.max_length="
            f"{self.rollout.max_length}, for a trajectory fills one row; got {self.rl.row_length}",
            "rl.row_length",
            "rollout.max_length",
        )
        require(
            "rl" not in self.phases or self.rl.algorithm != "grpo" or self.rollout.samples > 1,
            f"rollout.samples must be at least 2 when rl.algorithm is grpo; got {self.rollout.samples}",
            "rollout.samples",
            "rl.algorithm",
        )
        require(
            not (self.rl.async_rollouts and self.mesh.distributed),
            "rl.async_rollouts must be false when mesh.distributed is true: processes launch programs in one order; "
            "got true",
            "rl.async_rollouts",
            "mesh.distributed",
        )
        return self

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        """Devices that also search run one program after the other, in the same order everywhere."""
        why = "when retrieval.kind is device: the devices that sample and train also search"
        for name, wanted, found in (
            ("rollout.search_overlap", 0, self.rollout.search_overlap),
            ("rl.async_rollouts", False, self.rl.async_rollouts),
        ):
            require(
                self.retrieval.kind != "device" or found == wanted,
                f"{name} must be {str(wanted).lower()} {why}; got {str(found).lower()}",
                name,
                "retrieval.kind",
            )
        return self

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        """There is a judge where one is needed."""
        needed = {"eval.judge is true": self.eval.judge, "eval.candidate_em is true": self.eval.candidate_em}
        if "rl" in self.phases:
            needed |= {
                "rewards.outcome is judge": self.rewards.use_outcome and self.rewards.outcome == "judge",
                "rewards.process is judge": self.rewards.use_process and self.rewards.process == "judge",
            }
        name = "judge.endpoint.url" if self.judge.kind == "server" else "judge.local.path"
        for reason in (reason for reason, is_so in needed.items() if is_so):
            require(
                self.judge.is_given,
                f"{name} must be given when {reason} (and judge.kind is {self.judge.kind}); got none",
                name,
                reason.split()[0],
            )
        return self

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        """An inference server serves one policy, which cannot be changed from here."""
        if not self.rollout.server.is_given:
            return self
        require(
            "rl" not in self.phases,
            "phases must not have rl when rollout.server.url is given: RL samples with the policy that it trains; "
            f"got {', '.join(self.phases)}",
            "phases",
            "rollout.server.url",
        )
        policies = {"base" if system in BASE_SYSTEMS else system for system in self.eval.systems}
        require(
            "eval" not in self.phases or len(policies) == 1,
            "eval.systems must be of one policy, the served one, when rollout.server.url is given: "
            f"{', '.join(BASE_SYSTEMS)}, or cold_start, or r3rag; got {', '.join(self.eval.systems)}",
            "eval.systems",
            "rollout.server.url",
        )
        require(
            not self.mesh.distributed,
            "mesh.distributed must be false when rollout.server.url is given; got true",
            "mesh.distributed",
            "rollout.server.url",
        )
        return self
