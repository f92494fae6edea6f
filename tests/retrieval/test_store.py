"""Passages in memory-mapped files: by id, by position, in order, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from r3rag_jax.errors import UserError
from r3rag_jax.retrieval import store as store_module
from r3rag_jax.retrieval.fingerprint import corpus_fingerprint
from r3rag_jax.retrieval.store import PassageStore, write_store
from r3rag_jax.types import Passage

PASSAGES = [Passage(id, f'"{id}"\nTéxt \u2028 of {id} 😀\n') for id in ("b", "a", "é", "10", "9", "", "a b")]


@pytest.fixture
def store(tmp_path: Path) -> PassageStore:
    assert write_store(tmp_path, iter(PASSAGES)) == corpus_fingerprint(PASSAGES)
    return PassageStore(tmp_path)


def test_passages_by_id_by_position_and_in_order(store: PassageStore) -> None:
    assert len(store) == len(PASSAGES)
    assert list(store) == [passage.id for passage in PASSAGES]
    assert list(store.passages()) == list(store.values()) == PASSAGES
    assert [store.at(position) for position in range(len(PASSAGES))] == PASSAGES
    assert store.at(np.int64(2)) == PASSAGES[2]
    assert {passage.id: passage for passage in PASSAGES} == dict(store)
    assert "é" in store and "e" not in store and store.get("c") is None
    with pytest.raises(KeyError, match="c"):
        store["c"]


def test_ids_whose_hashes_collide_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_hash", lambda id: np.uint64(len(id)))
    write_store(tmp_path, PASSAGES)
    store = PassageStore(tmp_path)
    assert [store[passage.id] for passage in PASSAGES] == PASSAGES
    assert "c" not in store and "abc" not in store
    with pytest.raises(UserError, match=r"'a' occurs twice: passages 2 and 8 of the corpus"):
        write_store(tmp_path, [*PASSAGES, Passage("a", "again")])


def test_random_corpora_are_found_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [str(i) for i in rng.permutation(100_000)[:5_000]]
    passages = {id: Passage(id, "x" * int(rng.integers(1, 50))) for id in ids}
    write_store(tmp_path, passages.values())
    store = PassageStore(tmp_path)
    assert all(store[id] == passage for id, passage in passages.items())
    assert not any(id in store for id in map(str, range(100_000, 100_500)))


def test_several_threads_read_at_once(store: PassageStore) -> None:
    wrong: list[Passage] = []

    def read() -> None:
        for _ in range(300):
            wrong.extend(passage for passage in PASSAGES if store[passage.id] != passage)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_files_that_do_not_fit_together_are_refused(store: PassageStore, tmp_path: Path) -> None:
    data = tmp_path / "passages.jsonl"
    data.write_bytes(data.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"passages\.jsonl must have the \d+ bytes and 7 passages that .*; got \d+"):
        PassageStore(tmp_path)
    data.unlink()
    with pytest.raises(UserError, match=r"passages\.jsonl is missing or empty"):
        PassageStore(tmp_path)
    np.save(tmp_path / "passage_hashes.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"passage_hashes\.npy must be uint64 \[P\]; got float64 \[3\]"):
        PassageStore(tmp_path)
