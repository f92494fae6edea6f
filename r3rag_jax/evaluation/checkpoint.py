"""What evaluation and `ask` work with: a trained run, or a model from elsewhere, and the configuration of either."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from r3rag_jax.config import Config, load_config
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.systems import BASE_POLICY
from r3rag_jax.models.hf.conversion import POLICY_PHASES
from r3rag_jax.models.hf.tensor_files import CONFIG_FILE
from r3rag_jax.models.paths import model_path
from r3rag_jax.run.directory import RunDirectory

NEEDS_PASSAGES = (
    "a Hugging Face directory comes without passages: --corpus FILE, or --config RECIPE with data.corpus, or "
    "retrieval.index_dir=DIR"
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A trained run or a model.

    Fields:
        config: how it is used, without training.
        run: where results go: the run's directory, or one that is made for those of the model.
        is_run: whether it is a run, which has its index and may have several policies.
    """

    config: Config
    run: RunDirectory
    is_run: bool

    @property
    def builds_index(self) -> bool:
        """Whether an index of `data.corpus` is built in `run`, unless it is there."""
        retrieval = self.config.retrieval
        return not self.is_run and not retrieval.index_dir and retrieval.kind != "http"

    def choose_policy(self, policy: str | None = None) -> str:
        """Return the policy to work with: `policy` (BASE_POLICY or a phase), or the last one that a run has trained.

        Raises:
            UserError: see the function `choose_policy`.
        """
        return choose_policy(self.run, self.config, policy) if self.is_run else BASE_POLICY


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags `--checkpoint`, `--config`, `--corpus` and `--phase`, and the words `key=value`."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR",
        help="a run directory, or a model: a Hugging Face directory or package:NAME",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="with a model: a YAML recipe for protocol, retrieval and data"
    )
    parser.add_argument(
        "--corpus", type=Path, metavar="FILE", help="passages; default: the run's index, or the recipe's corpus"
    )
    parser.add_argument("--phase", choices=POLICY_PHASES, help="which policy of the run; default: the last one trained")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys to change")


def open_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """Return what the flags and words of `add_checkpoint_flags` name.

    Raises:
        UserError: --checkpoint is neither a run nor a model, a flag does not go with it, or the configuration is wrong.
    """
    run = RunDirectory.at(args.checkpoint)
    if run.config_file.is_file():
        if args.config is not None:
            raise UserError(f"--config must be left out with a run, which has its own; got {args.config}")
        return Checkpoint(load_run_config(run, args.overrides), run, is_run=True)
    path = model_path(args.checkpoint)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            "--checkpoint must be a run directory with config.yaml or a Hugging Face directory with "
            f"{CONFIG_FILE}; got {args.checkpoint}"
        )
    if args.phase is not None:
        raise UserError(f"--phase must be left out with a model, which is one policy; got {args.phase}")
    config = _model_config(path, args.config, args.overrides)
    checkpoint = Checkpoint(config, RunDirectory.at(config.run_directory), is_run=False)
    is_given = args.corpus is not None or args.config is not None or "data.source" in named_keys(args.overrides)
    if checkpoint.builds_index and not is_given:  # the default, the fictional encyclopedia, is nobody's corpus
        raise UserError(NEEDS_PASSAGES)
    return checkpoint


def named_keys(overrides: Sequence[str]) -> set[str]:
    """The keys of `key=value` words."""
    return {word.partition("=")[0].strip() for word in overrides}


def load_run_config(run_dir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a trained run, for use without training.

    Raises:
        UserError: the directory holds no run, or a `key=value` among the overrides is wrong.
    """
    run = RunDirectory.at(run_dir)
    if not run.config_file.is_file():
        raise UserError(f"--checkpoint must be a run directory with config.yaml; got {run.place}")
    # Relations that only training needs are not checked: no training phase is listed.
    return load_config(run.config_file, [*overrides, f"run_dir={run.place}", "phases=index"])


def _model_config(path: Path, recipe: Path | None, overrides: Sequence[str]) -> Config:
    """Return the configuration to use a model with: of a recipe, or the defaults."""
    # A recipe's own run directory is that of its training.
    own = ["run_dir=" if "name" in named_keys(overrides) else f"run_dir=runs/eval-{_model_name(path)}"]
    fixed = [f"model.path={path}", "model.init=pretrained", "data.refresh_retrieved=false", "phases=index"]
    config = load_config(recipe, [*own, *overrides, *fixed])
    directory = config.run_directory
    if isinstance(directory, Path) and path.resolve() in (directory.resolve(), *directory.resolve().parents):
        raise UserError(f"run_dir must be outside of the model's directory {path}; got {directory}")
    if (run := RunDirectory.at(directory)).config_file.exists():
        raise UserError(
            f"run_dir must not be a run, which has results of its own; got {directory}. Its index is named by "
            f"retrieval.index_dir={run.index}"
        )
    return config


def _model_name(path: Path) -> str:
    """Return a model's name: that of its directory or, in Hugging Face's cache, of its repository."""
    path = path.resolve()
    is_cached = path.parent.name == "snapshots"
    return path.parent.parent.name.rpartition("--")[2] if is_cached else path.name


def choose_policy(run: RunDirectory, config: Config, policy: str | None = None) -> str:
    """Return the policy to work with: `policy` (BASE_POLICY or a phase), or that of the last phase that has finished.

    An inference server has its policy already: then the result may be "".

    Raises:
        UserError: the phase has not finished.
    """
    if policy == BASE_POLICY:
        return policy
    trained = [name for name in POLICY_PHASES if run.policy(name).exists()]
    chosen = policy or (trained[0] if trained else "")
    if chosen not in trained and not config.rollout.server.is_given:
        raise UserError(f"{run.place} has no trained policy{f' of phase {chosen}' if chosen else ''}")
    return chosen
