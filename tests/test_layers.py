"""The structure of the package: folders import downwards, files stay readable, nothing runs at import."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import r3rag_jax

PACKAGE = Path(r3rag_jax.__file__).parent
FOLDERS = (
    "types errors json_text config parallel run text data clients serving models retrieval sampler rollout rewards rl "
    "training compiling baselines coldstart evaluation reporting live world components cells experiment"
).split()  # the order of docs/concepts.md: each imports only from those before it
ENTRY_POINTS = "train evaluate ask index serve convert compile demo report pretrain".split()
FOLDER_ENTRY_POINTS = ["coldstart"]  # `python -m r3rag_jax.coldstart` runs coldstart/__main__.py
MAINS = [f"{name}.__main__" for name in FOLDER_ENTRY_POINTS]
RANK = {name: rank for rank, name in enumerate(FOLDERS)} | dict.fromkeys([*ENTRY_POINTS, *MAINS], len(FOLDERS))
LAZY = (
    "accelerate", "bm25s", "faiss", "gguf", "grain", "matplotlib", "pyarrow", "pymilvus", "tensorboardX",
    "tensorflow", "tensorflow_datasets", "torch", "trackio", "transformers", "wandb",
)  # fmt: skip
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ENTRY_POINT_LINES = 500, 60, 80
# Factories, which choose a part once for the devices at hand; nothing else asks what they are.
MAY_ASK_FOR_PLATFORM = {"parallel.mesh", "retrieval.encoders.factory"}
PLATFORM_QUERY = re.compile(r"(?<!host\.)\b(default_backend|platform|on_several_devices|collectives_race)\(\)")
# A file that is written in place is half a file after a crash, and an empty one on a full disk.
WRITES = re.compile(r"""\.write_(text|bytes)\(|open\(([^()]*, ?)?["'][wax]|np\.save|\.write_index\(|json\.dump\(""")
MAY_WRITE = {
    "run.files",  # the helpers
    "run.lock",  # its file holds nothing that is read again
    "run.checkpoints",  # into a file that a helper has opened
    "rewards.judge.judgements",  # appends a line at once, for several runs
    "coldstart.journal",  # appends a line at once, and removes half a one
    "retrieval.store", "retrieval.encoders.hashed", "retrieval.ann",  # into a new directory, which is then renamed
}  # fmt: skip


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


def folder_of(module: str) -> str:
    return module if module in MAINS else module.split(".")[0]


def may_import(importer: str, imported: str) -> bool:
    """Folders above in the list, or the own folder; entry points import no other entry point."""
    above, below = folder_of(importer), folder_of(imported)
    return RANK[below] < RANK[above] or above == below


def test_the_parser_sees_every_form_of_import() -> None:
    source = (
        "import r3rag_jax.types\nfrom r3rag_jax import errors\nfrom r3rag_jax.models.hf import x\n"
        "import jax\ndef f():\n    from r3rag_jax.rl.losses import masked_mean\n"
    )
    assert imports_of(source) == {"types", "errors", "models.hf", "rl.losses"}


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("config.loader", "training.steps", False),
        ("rollout.scheduler", "training.batch", False),
        ("train", "training.rl", True),
        ("train", "evaluate", False),
        ("coldstart.__main__", "components", True),
        ("coldstart.builder", "components", False),
        ("rewards.scorer", "rewards.answer", True),
        ("text.transcript", "sampler.engine", False),
        ("models.hf", "train", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_every_module_has_a_place() -> None:
    assert {name for name in modules() if name and folder_of(name) not in RANK} == set()


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


def test_files_and_functions_can_be_read_at_one_sitting() -> None:
    long = []
    for name, file in modules().items():
        source = file.read_text()
        limit = MAX_ENTRY_POINT_LINES if name in [*ENTRY_POINTS, *MAINS] else MAX_FILE_LINES
        if (count := source.count("\n")) > limit:
            long.append(f"{name}: {count} lines, at most {limit}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    long.append(f"{name}.{node.name}: {count} lines, at most {MAX_FUNCTION_LINES}")
    assert long == []


def test_the_platform_is_asked_for_by_factories_alone() -> None:
    asking = {name for name, file in modules().items() if PLATFORM_QUERY.search(file.read_text())}
    assert asking <= MAY_ASK_FOR_PLATFORM


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter in which every query for a device fails."""
    environment = os.environ | {"JAX_PLATFORMS": "nosuchplatform", "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_files_are_written_by_the_helpers_that_write_whole_files() -> None:
    writing = {name for name, file in modules().items() if WRITES.search(file.read_text())}
    assert writing == MAY_WRITE


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
