"""The notebooks: evaluate.ipynb on run directories, finished or not; build_your_own.ipynb from documents to answers."""

import ast
import json
import os
from pathlib import Path

import pytest
import synthetic_run
from openai_server import serve
from scripted_teacher import ScriptedTeacher

from r3rag_jax.data.questions import read_questions

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EVALUATE, BUILD = FOLDER / "evaluate.ipynb", FOLDER / "build_your_own.ipynb"


def read(path):
    nbformat = pytest.importorskip("nbformat", reason="needs the `notebook` extra")
    return nbformat.read(path, as_version=4)


def execute(path, place, variables, monkeypatch):
    """The executed notebook's code cells; CellExecutionError when one fails."""
    nbclient = pytest.importorskip("nbclient", reason="needs the `notebook` extra")
    pytest.importorskip("ipykernel", reason="needs the `notebook` extra")
    pytest.importorskip("matplotlib", reason="needs the `notebook` extra")
    environment = variables | {
        "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(FOLDER.parent), "IPYTHONDIR": str(place / "ipython"),
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def evaluate(run_dir, monkeypatch):
    return execute(EVALUATE, run_dir.parent, {"R3RAG_RUN": str(run_dir)}, monkeypatch)


def kinds(cell):
    """MIME types and streams that a cell put out."""
    return [kind for out in cell.outputs for kind in out.get("data", {out.get("name"): None})]


def texts(cell):
    """What a cell printed."""
    return "".join(out.get("text", "") for out in cell.outputs if out.output_type == "stream")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs_and_without_definitions(path):
    nbformat = pytest.importorskip("nbformat", reason="needs the `notebook` extra")
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
        lines = cell.source.splitlines() if cell.cell_type == "code" else []
        source = "\n".join("" if "!python" in line else line for line in lines)
        defined = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert defined == [], "notebooks import, and define nothing"


def test_runs_on_a_finished_run(tmp_path, monkeypatch):
    run_dir = synthetic_run.add_recorded(synthetic_run.build(tmp_path / "synthetic"), iterations=1)
    load, results, rl, sft, time, errors, trajectories, change = evaluate(run_dir, monkeypatch)
    assert "text/markdown" in kinds(load) and "stderr" not in kinds(load)
    assert kinds(results).count("text/html") == 1
    assert "image/png" in kinds(rl) and "image/png" in kinds(sft)
    assert "Time of an iteration" in time.outputs[0].data["text/html"]
    assert "bridge comparison" in errors.outputs[0].data["text/html"]
    assert kinds(trajectories).count("text/html") == 3
    assert trajectories.outputs[0].text == "r3rag: 8 of 16 right, 8 wanted\n"
    assert change.outputs[0].text == "of 16 questions 4 newly right, 4 newly wrong\n"
    assert "McNemar, exact: p = 1." in change.outputs[1].data["text/html"]
    assert kinds(change).count("text/html") == 3


@pytest.mark.slow
def test_runs_on_half_a_run(tmp_path, monkeypatch):
    half = synthetic_run.build(tmp_path / "half", ("sft",))
    _, results, rl, sft, time, errors, trajectories, change = evaluate(half, monkeypatch)
    assert results.outputs[0].text == "no system has been evaluated yet\n"
    assert rl.outputs[0].text == "nothing of phase rl has been logged yet\n"
    assert "image/png" in kinds(sft)
    assert "No iteration says" in time.outputs[0].data["text/html"]
    assert "text/html" in kinds(errors)
    assert trajectories.outputs[0].text == "None: 0 of 0 right, 0 wanted\n"
    assert change.outputs[0].text == "of 0 questions 0 newly right, 0 newly wrong\n"


@pytest.mark.slow
def test_runs_on_several_runs(tmp_path, monkeypatch):
    runs = [synthetic_run.build(tmp_path / name) for name in ("one", "two")]
    variables = {"R3RAG_RUN": " ".join(map(str, runs))}
    load, results, rl, *_ = execute(EVALUATE, tmp_path, variables, monkeypatch)
    assert kinds(load).count("text/markdown") == kinds(results).count("text/html") == 2
    assert "image/png" in kinds(rl)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["gold", "scripted"])
def test_own_documents_become_an_agent(teacher, tmp_path, monkeypatch):
    keys = "sft.epochs=1 rl.iterations=1 rl.questions=2 rollout.samples=2 rl.eval_every=1"
    for name in [name for name in os.environ if name.startswith(("JAX_", "XLA_"))]:
        monkeypatch.delenv(name)  # the commands of the notebook are those of a user
    variables = {"R3RAG_OUT": str(tmp_path / "own"), "R3RAG_KEYS": keys}
    if teacher == "gold":
        check_own(execute(BUILD, tmp_path, variables, monkeypatch), tmp_path / "own")
        return
    from r3rag_jax.config import load_config
    from r3rag_jax.run.directory import RunDirectory
    from r3rag_jax.world.dataset import write_world
    from r3rag_jax.world.encyclopedia import World

    config = load_config(FOLDER.parent / "configs" / "quickstart.yaml", ["world.num_rl=60", "world.num_test=4"])
    mine = RunDirectory(tmp_path / "mine")
    write_world(World.generate(7, num_people=60), config, mine)
    with serve(ScriptedTeacher(read_questions(mine.data("rl"))).reply) as server:
        variables |= {"R3RAG_TEACHER": f"coldstart.teacher.url={server.url} coldstart.teacher.model=m"}
        variables |= {"R3RAG_DATA": str(mine.data_dir), "no_proxy": "127.0.0.1"}
        check_own(execute(BUILD, tmp_path, variables, monkeypatch), tmp_path / "own")
        assert len(server.bodies) >= 40


def check_own(cells, out):
    _, data, index, taught, trained, asked, report = cells
    assert "golden_answers" in texts(data)
    assert (out / "index").is_dir() and "recall" in texts(index).lower()
    assert int(texts(taught).rsplit(" trajectories", 1)[0].split()[-1]) > 20 and "text/html" in kinds(taught)
    assert (out / "run" / "policy" / "rl").is_dir() and "R3-RAG" in trained.outputs[-1].data["text/html"]
    reply = json.loads(texts(asked).partition("\n")[2])
    assert "error" not in reply
    assert (out / "run" / "report.html").is_file() and "report.html" in texts(report)
