"""What a user has besides a corpus: vectors of its passages, or a FAISS index that was built elsewhere.

FlashRAG and Search-R1 publish such an index beside a corpus (`e5_Flat.index`, `wiki-18.jsonl`). It is linked into the
index directory as it is, after it was compared with the corpus and the encoder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r3rag_jax.config.retrieval import FaissConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.ann import file_name, import_faiss, open_file
from r3rag_jax.retrieval.base import Encoder
from r3rag_jax.retrieval.encoding import check_encoder, encode_at, spot_checks
from r3rag_jax.retrieval.manifest import sample_digest
from r3rag_jax.retrieval.planner import FaissPlan
from r3rag_jax.retrieval.store import PassageStore

GIVEN = "given"  # instead of a kind: an index that was built elsewhere
_DEPTH = 100  # an approximate index must find most passages among so many nearest of their own vectors


def take_index(path: Path, encoder: Encoder, store: PassageStore, directory: Path) -> dict[str, Any]:
    """Link, or copy, a FAISS file into an index directory; returns what identifies it.

    Raises:
        UserError: FAISS cannot read it, or it is not one of inner products of the encoder's vectors of the passages.
    """
    index = open_file(path)
    if (index.ntotal, index.d) != (len(store), encoder.dim):
        raise UserError(
            f"{path} must hold one vector of the encoder's size per passage, {len(store)} of {encoder.dim}; "
            f"got {index.ntotal} of {index.d}"
        )
    if index.metric_type != import_faiss().METRIC_INNER_PRODUCT:
        raise UserError(f"{path} must be an index of inner products, FAISS's metric 0; got metric {index.metric_type}")
    if _is_flat(index):
        check_encoder(encoder, store.at, index.reconstruct_batch, len(store), str(path))
    else:
        positions = spot_checks(len(store))
        _, found_ND = index.search(encode_at(encoder, store.at, positions), _DEPTH)
        num = int((found_ND == positions[:, None]).any(axis=1).sum())
        if 2 * num < len(positions):
            raise UserError(
                f"{path} must find passages by the encoder's vectors of them, {len(positions)} were tried; got {num}. "
                "Another model, retrieval.encoder.pooling or passage_prefix, or order of passages, has made it"
            )
    target = directory / file_name(0)
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # another file system
        shutil.copyfile(path, target)
    return {"kind": GIVEN, "sample": sample_digest(target)}


def open_given(config: FaissConfig, index_dir: Path, built: Mapping[str, Any]) -> dict[str, Any]:
    """What a FaissRetriever needs of such an index: `index`, `take`, `plan`, `settings`."""
    index = open_file(index_dir / file_name(0), search_ef=config.hnsw_search_ef, probes=config.ivf_probes)
    if _is_flat(index):
        return {"index": index, "take": index.reconstruct_batch, "settings": built["sample"]}
    settings = json.dumps([built["sample"], config.hnsw_search_ef, config.ivf_probes, config.candidates])
    return {"index": index, "take": None, "plan": FaissPlan(GIVEN, "", config.candidates), "settings": settings}


def _is_flat(index: Any) -> bool:
    """Whether the index searches exactly and holds the vectors."""
    return isinstance(index, import_faiss().IndexFlat)
