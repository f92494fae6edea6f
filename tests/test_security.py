"""What SECURITY.md promises of the package's own code: no data becomes code, and names reach nothing else."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import r3rag_jax
from r3rag_jax.config import load_config
from r3rag_jax.config.serving import ServeConfig
from r3rag_jax.errors import UserError
from r3rag_jax.evaluation.results import check_name
from r3rag_jax.models.paths import model_path

PACKAGE = Path(r3rag_jax.__file__).parent
ROOT = PACKAGE.parent
# Modules that turn data into code or objects of any class, or that start programs.
MODULES = (
    "pickle cPickle _pickle marshal shelve dill cloudpickle joblib code codeop runpy ctypes cffi subprocess pty "
    "importlib pkgutil"
).split()
CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "breakpoint")
OPENED = {  # a call -> what it must be given, or None: it must not be made
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
    "np.lib.format.read_array": "allow_pickle=False",
    "yaml.load": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "yaml.load_all": None,
    "torch.load": None,
    "jinja2.Environment": None,
    "jinja2.Template": None,
    "tempfile.mktemp": None,
}
WORDS = re.compile(r"trust_remote_code|shell\s*=\s*True|allow_pickle\s*=\s*True|verify\s*=\s*False")
ALLOWED = {  # (module, what it does) -> why
    ("sampler.kernels.cpu.build", "subprocess"): "calls the compiler on the source in the package",
    ("sampler.kernels.cpu.build", "ctypes"): "loads what the compiler has made of it",
    ("models.paths", "importlib"): "finds the folder of an installed package that `package:` names; imports nothing",
    ("data.wikihop", "importlib"): "finds the folder of an installed package; imports nothing",
    ("compiling.devices", "importlib"): "asks whether the TPU compiler is installed",
    ("models.hf.gguf_files", "importlib"): "imports packages of a fixed list when they are needed",
    ("run.store", "importlib"): "likewise",
    ("run.trackers.base", "importlib"): "likewise, those of `log.trackers`",
    ("live.page", "jinja2.Environment"): "renders the package's own templates, with every text escaped",
    ("reporting.rendering", "jinja2.Environment"): "likewise",
}


@functools.cache
def trees() -> dict[str, ast.Module]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): ast.parse(f.read_text()) for f in files}


def uses(tree: ast.Module) -> Iterator[str]:
    """What a module does of the above."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from (top for name in names if (top := name.partition(".")[0]) in MODULES and name not in RESOURCES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield name
            if name in OPENED and (OPENED[name] is None or OPENED[name] not in ast.unparse(node)):
                yield name
        if isinstance(node, ast.keyword) and WORDS.fullmatch(ast.unparse(node)):
            yield ast.unparse(node)


RESOURCES = ("importlib.resources", "importlib.metadata")  # files and versions of installed packages


def test_the_parser_sees_what_it_looks_for() -> None:
    source = (
        "import pickle, os\nfrom subprocess import run\nimport importlib.resources\nx = eval('1')\nos.system('ls')\n"
        "np.load(p)\nnp.load(p, allow_pickle=False)\nyaml.load(t, Loader=L)\nf(trust_remote_code=True)\n"
        "re.compile('x')\n"
    )
    found = ["pickle", "subprocess", "eval", "os.system", "np.load", "yaml.load"]
    assert [name for name in uses(ast.parse(source)) if "trust" not in name] == found
    assert "trust_remote_code" in WORDS.pattern


def test_no_data_becomes_code() -> None:
    found = {(name, what) for name, tree in trees().items() for what in uses(tree)}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "an exception that nobody needs"


def test_templates_of_others_run_in_the_sandbox_alone() -> None:
    makers = {name for name, tree in trees().items() if "SandboxedEnvironment" in ast.unparse(tree)}
    using = {name for name, tree in trees().items() if "LimitedEnvironment" in ast.unparse(tree)}
    assert makers == {"text.template_limits"} and using == makers | {"text.chat_template"}
    rendering = {name for name, tree in trees().items() if "jinja2" in ast.unparse(tree)}
    assert rendering <= using | {name for name, what in ALLOWED if what == "jinja2.Environment"}


def test_servers_listen_on_loopback_unless_told() -> None:
    assert ServeConfig().host == "127.0.0.1"
    listening = [name for name, tree in trees().items() if re.search(r"'0\.0\.0\.0'|\"0\.0\.0\.0\"", ast.unparse(tree))]
    assert listening == []


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/x", "a\\b", "a\0b", "-x", "a\n", "a b", ".hidden"])
def test_names_reach_no_other_folder(name: str) -> None:
    with pytest.raises(UserError, match="name must be"):
        load_config(None, [f"name={name!r}" if name.strip() != name else f"name={name}"])
    with pytest.raises(UserError, match="--name must be"):
        check_name(name)
    with pytest.raises(UserError, match="must name an installed package"):
        model_path(f"package:{name}")
    with pytest.raises(UserError):
        load_config(None, [f"eval.systems=[{name!r}]"])


def test_a_report_to_somebody_is_possible() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    assert "## How to report" in text and "## What is promised" in text and "## What is not" in text
