"""notebooks/evaluate.ipynb runs from top to bottom on a run directory, finished or not."""

from pathlib import Path

import pytest
import synthetic_run

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "evaluate.ipynb"


def execute(run_dir, monkeypatch):
    """The executed notebook's code cells; CellExecutionError when one fails."""
    nbformat = pytest.importorskip("nbformat", reason="needs the `notebook` extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the `notebook` extra")
    pytest.importorskip("ipykernel", reason="needs the `notebook` extra")
    pytest.importorskip("matplotlib", reason="needs the `notebook` extra")
    monkeypatch.setenv("R3RAG_RUN", str(run_dir))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    monkeypatch.setenv("IPYTHONDIR", str(run_dir.parent / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(run_dir.parent)}},
    )
    client.execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """MIME types and streams that a cell put out."""
    return [kind for out in cell.outputs for kind in out.get("data", {out.get("name"): None})]


def test_committed_without_outputs():
    nbformat = pytest.importorskip("nbformat", reason="needs the `notebook` extra")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_runs_on_a_finished_run(tmp_path, monkeypatch):
    load, results, rl, sft, trajectories, change = execute(synthetic_run.build(tmp_path / "synthetic"), monkeypatch)
    assert "text/markdown" in kinds(load) and "stderr" not in kinds(load)
    assert kinds(results).count("text/html") == 1
    assert "image/png" in kinds(rl) and "image/png" in kinds(sft)
    assert kinds(trajectories).count("text/html") == 3
    assert trajectories.outputs[0].text == "r3rag: 8 of 16 right, 8 wanted\n"
    assert change.outputs[0].text == "of 16 questions 4 newly right, 4 newly wrong\n"
    assert kinds(change).count("text/html") == 2


@pytest.mark.slow
def test_runs_on_half_a_run(tmp_path, monkeypatch):
    _, results, rl, sft, trajectories, change = execute(synthetic_run.build(tmp_path / "half", ("sft",)), monkeypatch)
    assert results.outputs[0].text == "no system has been evaluated yet\n"
    assert rl.outputs[0].text == "nothing of phase rl has been logged yet\n"
    assert "image/png" in kinds(sft)
    assert trajectories.outputs[0].text == "None: 0 of 0 right, 0 wanted\n"
    assert change.outputs[0].text == "of 0 questions 0 newly right, 0 newly wrong\n"
