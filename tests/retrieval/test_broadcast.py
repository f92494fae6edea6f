"""Two real processes with one retriever: process 0 searches, both get equal hits, and a failed search fails on both.

At the end process 1 fails alone, while process 0 waits for it in a device program: both say why, and end.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from corpora import encyclopedia
from two_processes import Pair

from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.parallel.failures import PEER_FAILED_STATUS
from r3rag_jax.retrieval.factory import build_index, open_retriever

IMPORTS = """
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from r3rag_jax.config import load_config
from r3rag_jax.config.retrieval import RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.parallel.processes import broadcast_json, check_same, from_process_0, joined
from r3rag_jax.retrieval.base import RetrievalError
from r3rag_jax.retrieval.broadcast import BroadcastRetriever
from r3rag_jax.retrieval.factory import open_retriever

index_dir, *words = sys.argv[1:]
mesh_config = load_config(None, words).mesh
rank = mesh_config.process_id
"""

PROGRAM = """
out = {}

# Values of any size and every float, in the order of the calls with a name.
value = {"text": "\\u2028 \\U0001f600" * 500_000, "floats": [0.1, 1e-45, float("inf"), None]} if rank == 0 else None
out["large"] = broadcast_json(value, "large") == {
    "text": "\\u2028 \\U0001f600" * 500_000, "floats": [0.1, 1e-45, float("inf"), None]
}
out["calls"] = [broadcast_json([rank, i], "small") for i in range(3)]

def compute(values, is_broken=False):
    assert rank == 0, "only process 0 computes"
    if is_broken:
        raise UserError("down")
    return np.asarray(values, np.float32)


out["array"] = [float(x).hex() for x in from_process_0(lambda: compute([0.1, np.nan, 1e-45]), "array")]
try:
    from_process_0(lambda: compute([], is_broken=True), "array")
except UserError as error:
    out["down"] = str(error)

# The index is where process 0 can see it; searches of several threads come in another order on each process, beside
# programs on the devices of both.
retriever = open_retriever(RetrievalConfig(), Path(index_dir) if rank == 0 else "nowhere")
queries = [[f"director of The Silver Harbor {i}", "qqqq", "Where is The Iron Crown set?"] for i in range(8)]


def search(i):
    time.sleep(0.05 * ((i * 3 + 5 * rank) % 7))
    return retriever.search(queries[i], 3)


mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
ones = jax.device_put(jnp.ones(jax.device_count()), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
with ThreadPoolExecutor(3) as pool:
    order = range(8) if rank == 0 else reversed(range(8))
    futures = {i: pool.submit(search, i) for i in order}
    sums = [float(jax.jit(jnp.sum)(ones * n)) for n in range(20)]
    found = [futures[i].result() for i in range(8)]
out["sums"] = sums == [n * jax.device_count() for n in range(20)]
out["hits"] = [[[[hit.passage.id, hit.score.hex()] for hit in hits] for hits in rows] for rows in found]
out["fingerprint"], out["empty"] = retriever.fingerprint, retriever.search([], 3)


class Broken:
    fingerprint = "broken"

    def search(self, queries, k):
        raise RetrievalError(f"no search for {queries[0]!r}")


broken = BroadcastRetriever(Broken)
try:
    broken.search(["Who?"], 1)
except RetrievalError as error:
    out["error"] = str(error)
try:
    open_retriever(RetrievalConfig(), index_dir if rank else "nowhere")
except ValueError as error:
    out["open"] = f"{type(error).__name__}: {error}"
try:
    check_same(lambda: [1, rank], "files")
except UserError as error:
    out["differs"] = str(error)
print("OUT" + json.dumps(out), flush=True)
if rank == 1:
    raise UserError("only this process fails")
jax.jit(jnp.sum)(ones).block_until_ready()  # needs the other one
"""


def test_two_processes_get_the_same_hits_and_the_same_error(tmp_path: Path) -> None:
    build_index(RetrievalConfig(), encyclopedia(), tmp_path / "index")
    program = f"{IMPORTS}\nwith joined(mesh_config):\n{textwrap.indent(PROGRAM, '    ')}"
    with Pair.start(["-c", program, str(tmp_path / "index")], tmp_path, devices=2) as pair:
        statuses = pair.statuses(240)
    said = pair.said()
    shown = "\n".join(text[-6000:] for text in said)
    try:
        first, second = (json.loads(text.split("OUT", 1)[1].splitlines()[0]) for text in said)
    except IndexError:
        pytest.fail(shown)
    for one in (first, second):
        assert one["large"] and one["sums"] and one["empty"] == []
        assert one["calls"] == [[0, 0], [0, 1], [0, 2]]
        assert one["array"] == [float(np.float32(x)).hex() for x in (0.1, np.nan, 1e-45)]
    assert (first["down"], second["down"]) == ("down", "process 0: down")
    alone = open_retriever(RetrievalConfig(), tmp_path / "index")
    expected = [
        [[[hit.passage.id, hit.score.hex()] for hit in hits] for hits in alone.search(queries, 3)]
        for queries in (
            [f"director of The Silver Harbor {i}", "qqqq", "Where is The Iron Crown set?"] for i in range(8)
        )
    ]
    assert first["hits"] == second["hits"] == expected
    assert first["fingerprint"] == second["fingerprint"] == alone.fingerprint
    assert (first["error"], second["error"]) == ("no search for 'Who?'", "process 0: no search for 'Who?'")
    assert first["open"].startswith("UserError: an index directory holds fingerprint.json; nowhere")
    assert second["open"].startswith("UserError: process 0: an index directory holds fingerprint.json; nowhere")
    assert first.keys() - {"differs"} == second.keys() - {"differs"}
    assert second["differs"].startswith(
        "all processes must have the same files; process 1 has [1, 1], process 0 [1, 0]"
    )
    assert statuses == [PEER_FAILED_STATUS, 2], shown
    assert "error: process 1: UserError: only this process fails\n" in said[0]
    assert "Traceback" not in said[0], said[0]  # of the connection that process 1 has closed
    assert "error: only this process fails\n" in said[1]
