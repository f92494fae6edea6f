"""The layering of the package: a file imports only from lower layers, and nothing runs at import."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

import r3rag_jax

PACKAGE = Path(r3rag_jax.__file__).parent
LAYERS = (
    "errors config configio types protocol sharding metrics endpoint",
    "models text data retrieval rl",
    "sampler rewards transcript prefix_tree",
    "rollout batch checkpoint view judges guards optimizer",
    "learner evaluator session report",
    "trainer",
    "train evaluate ask pretrain index serve coldstart convert compile demo",
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names.split()}
# Neighbours of one layer that may be imported above layer 1, where nothing but sub-packages has any.
SIBLINGS = {("session", "evaluator"), ("ask", "evaluate"), ("convert", "evaluate")}
LAZY = ("accelerate", "faiss", "gguf", "grain", "tensorflow", "tensorflow_datasets", "torch", "transformers")


@functools.cache
def modules() -> dict[str, Path]:
    """Dotted name under the package -> file, `__init__` files under their package's name."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in files]
    return {name.removesuffix("__init__").rstrip("."): file for name, file in zip(names, files, strict=True)}


def imports_of(source: str) -> set[str]:
    """Modules of the package that a source imports, also inside functions, as dotted names under it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    known = modules()
    inside = {name.removeprefix("r3rag_jax.") for name in found if name.startswith("r3rag_jax.")}
    return {name for name in inside if name in known}


def may_import(importer: str, imported: str) -> bool:
    """Lower layers; the own layer where it is 0 or 1, in the own sub-package, or a listed sibling."""
    above, below = importer.split(".")[0], imported.split(".")[0]
    if LAYER_OF[below] != LAYER_OF[above]:
        return LAYER_OF[below] < LAYER_OF[above]
    return LAYER_OF[above] <= 1 or above == below or (above, below) in SIBLINGS


def test_the_parser_sees_every_form_of_import() -> None:
    source = (
        "import r3rag_jax.text\nfrom r3rag_jax import learner\nfrom r3rag_jax.models.hf import x\n"
        "import jax\ndef f():\n    from r3rag_jax.rl.losses import masked_mean\n"
    )
    assert imports_of(source) == {"text", "learner", "models.hf", "rl.losses"}


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("config", "learner", False),
        ("learner", "session", False),
        ("rollout", "batch", False),
        ("train", "learner", True),
        ("rewards.score", "rewards.answer", True),
        ("transcript", "sampler.engine", False),
        ("models.hf", "train", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_every_module_has_a_layer() -> None:
    assert {name for name in modules() if name and name.split(".")[0] not in LAYER_OF} == set()


def test_imports_point_down() -> None:
    wrong = [
        f"{importer} imports {imported}"
        for importer, file in modules().items()
        if importer
        for imported in sorted(imports_of(file.read_text()))
        if not may_import(importer, imported)
    ]
    assert wrong == []


def test_no_import_cycles() -> None:
    graph = {name: imports_of(file.read_text()) - {name} for name, file in modules().items()}
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter in which every query for a device fails."""
    environment = os.environ | {"JAX_PLATFORMS": "nosuchplatform", "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_imports_touch_no_device_and_no_heavy_library() -> None:
    assert run_python("import jax; jax.devices()").returncode != 0  # the trap works
    names = ["r3rag_jax" + (f".{name}" if name else "") for name in modules()]
    lines = [f"import sys, importlib\nfor name in {names}: importlib.import_module(name)"]
    lines.append(f"print([name for name in {LAZY} if name in sys.modules])")
    done = run_python("\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_alone_loads_nothing() -> None:
    done = run_python("import sys, r3rag_jax; print([n for n in ('jax', 'flax', 'numpy') if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
