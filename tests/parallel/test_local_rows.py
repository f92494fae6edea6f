"""Batches in rows: every process makes those of its devices, also when a run goes on with more of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from two_processes import finish, free_port, spawn

from r3rag_jax.data.jsonl import write_jsonl
from r3rag_jax.data.questions import question_to_dict, read_questions
from r3rag_jax.data.readers import tfds
from r3rag_jax.data.records import Records
from r3rag_jax.data.sft import FlatSamples, SFTBatch, SFTBatches, SFTSample
from r3rag_jax.parallel.local_rows import device_put_rows, local_rows
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.shardings import device_put_batch
from r3rag_jax.types import Question

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight forced devices")


@pytest.mark.parametrize(("sizes", "num_rows"), [((-1, 1, 1), 8), ((2, 2, 2), 8), ((-1, 8, 1), 16), ((-1, 1, 1), 6)])
def test_rows_are_put_as_a_whole_batch_is(sizes: tuple[int, int, int], num_rows: int) -> None:
    mesh = make_mesh(tiny.mesh_config(*sizes))
    tree = {"tokens": np.arange(num_rows * 3, dtype=np.int32).reshape(num_rows, 3), "weights": np.ones(num_rows)}
    rows = local_rows(mesh, num_rows)
    assert rows == list(range(num_rows))  # one process holds all
    for found, expected in zip(
        jax.tree.leaves(device_put_rows(mesh, tree, rows, num_rows)),
        jax.tree.leaves(device_put_batch(mesh, tree)),
        strict=True,
    ):
        assert found.sharding == expected.sharding and found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_some_rows_are_placed_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(tiny.mesh_config(-1, 1, 1))
    placed = {}

    def record(shape, sharding, shard):
        for rows in (slice(2, 3), slice(5, 6), slice(6, 8)):
            placed[rows.start] = shard((rows, slice(None)))

    monkeypatch.setattr(jax, "make_array_from_callback", record)
    device_put_rows(mesh, np.asarray([[2], [5], [6], [7]]), [2, 5, 6, 7], 8)
    assert {row: part.tolist() for row, part in placed.items()} == {2: [[2]], 5: [[5]], 6: [[6], [7]]}


# ---------------------------------------------------------------- from files of one process to batches of two

OPTIONS = {"row_length": 48, "batch_rows": 4, "epochs": 2, "seed": 5}
RESUMED = """
import json, sys
from pathlib import Path

import jax

from r3rag_jax.config import MeshConfig
from r3rag_jax.data.readers import tfds
from r3rag_jax.data.sft import SFTBatches
from r3rag_jax.parallel.local_rows import device_put_rows, local_rows
from r3rag_jax.parallel.mesh import make_mesh
from r3rag_jax.parallel.processes import start_distributed
from r3rag_jax.parallel.shardings import replicated

directory, state, coordinator, rank = sys.argv[1:5]
config = MeshConfig(distributed=True, coordinator=coordinator, num_processes=2, process_id=int(rank))
start_distributed(config)
sys.path[:0] = [sys.argv[5], str(Path(sys.argv[5]).parent)]
from test_local_rows import OPTIONS, digest, samples_of  # asks for the devices
mesh = make_mesh(config)
rows = local_rows(mesh, OPTIONS["batch_rows"])
assert rows == [2 * int(rank), 2 * int(rank) + 1]
batches = SFTBatches(samples_of(tfds.open_split(Path(directory), "sft", "file")), rows=rows, **OPTIONS)
batches.set_state(json.loads(state))
whole = jax.jit(lambda batch: batch, out_shardings=replicated(mesh))
print([digest(whole(device_put_rows(mesh, batch, rows, OPTIONS["batch_rows"]))) for batch in batches])
"""


def samples_of(questions: Records[Question]) -> FlatSamples:
    """The bytes of each question, all but the first to be learnt."""

    def sample(question: Question) -> list[SFTSample]:
        ids = np.frombuffer(question.question.encode(), np.uint8).astype(np.int32)
        return [SFTSample(ids, np.arange(len(ids)) > 0)]

    return FlatSamples(questions.map(sample))


def digest(batch: SFTBatch) -> str:
    """Of all bits of a batch."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(batch):
        found.update(np.asarray(x).tobytes())
    return found.hexdigest()[:16]


@pytest.mark.slow
def test_two_processes_go_on_with_the_next_batch_of_one_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    texts = ["Who is " + "so " * (i % 13) + f"{i}?" for i in range(60)]
    write_jsonl(path, [{"id": i, "question": text, "golden_answers": ["x"]} for i, text in enumerate(texts)])
    rows = read_questions(path).map(question_to_dict)
    directory = tfds.build({"sft": rows}, tmp_path / "data", "questions")
    batches = SFTBatches(samples_of(read_questions(path)), **OPTIONS)
    for _ in range(3):
        next(batches)
    state = json.dumps(batches.get_state())
    rest = [digest(batch) for batch in batches]
    assert len(rest) > 3 and len(set(rest)) == len(rest)
    words = [str(directory), state, f"127.0.0.1:{free_port()}"]
    commands = [["-c", RESUMED, *words, str(rank), str(Path(__file__).parent)] for rank in range(2)]
    said = finish([spawn(command, 2, tmp_path) for command in commands])
    assert [text.splitlines()[-1] for text in said] == [str(rest)] * 2
