"""Search on the devices: the hits of FAISS, from one device or many, and what it refuses."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from bert_files import write_model, write_tokenizer
from corpora import AxisEncoder, encyclopedia, ids
from jax.sharding import Mesh

from r3rag_jax.config import ConfigError, load_config
from r3rag_jax.config.retrieval import EncoderConfig, RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import GivenFiles, RetrievalError
from r3rag_jax.retrieval.device import DeviceRetriever
from r3rag_jax.retrieval.encoders.bert import BertEncoder
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import build_index, open_local_retriever, open_retriever
from r3rag_jax.retrieval.faiss import FaissRetriever
from r3rag_jax.retrieval.nearest import search_mesh
from r3rag_jax.retrieval.vectors import VectorShards
from r3rag_jax.types import Passage

PASSAGES = encyclopedia()
QUERIES = ["director of The Silent Tower", "qqqq", "harbor", "Where is The Iron Crown set?", "music by Bo Ter7"]


@pytest.fixture(scope="module")
def encoder() -> HashEncoder:
    return HashEncoder(128).fit(passage.contents for passage in PASSAGES)


def on_devices(encoder, passages=PASSAGES, num_devices=8, **settings) -> DeviceRetriever:
    vectors = encoder.encode([passage.contents for passage in passages], kind="passage")
    mesh = search_mesh(jax.devices()[:num_devices])
    return DeviceRetriever(encoder, passages.__getitem__, VectorShards([vectors]), "corpus", mesh=mesh, **settings)


@pytest.mark.parametrize(
    ("num_devices", "dtype"), [(1, "float32"), (8, "bfloat16"), pytest.param(8, "int8", marks=pytest.mark.slow)]
)
def test_hits_and_scores_are_those_of_faiss(encoder, num_devices, dtype):
    retriever = on_devices(encoder, num_devices=num_devices, dtype=dtype)
    flat = FaissRetriever.of(encoder, PASSAGES)
    assert retriever.search(QUERIES, 3) == flat.search(QUERIES, 3)
    assert [len(hits) for hits in retriever.search(QUERIES, 1000)] == [216, 0, 216, 216, 216]


def test_without_candidates_the_devices_scores_rank(encoder):
    exact = FaissRetriever.of(encoder, PASSAGES).search(QUERIES, 3)
    found = on_devices(encoder, dtype="int8", candidates=0).search(QUERIES, 3)
    for ours, theirs in zip(found, exact, strict=True):
        scores = [hit.score for hit in ours]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [hit.score for hit in theirs], atol=0.01)
    assert found != exact  # of rounded vectors


def test_equal_scores_are_ranked_by_position():
    passages = [Passage(f"p{i}", "11" if i % 2 else "01") for i in range(200)]
    retriever = on_devices(AxisEncoder(), passages)
    assert [ids(hits) for hits in retriever.search(["55", "09"], 3)] == [["p1", "p3", "p5"], ["p0", "p2", "p4"]]


def test_fingerprints_differ_where_hits_may(encoder):
    settings = [{"dtype": "float32"}, {"dtype": "int8"}, {"dtype": "int8", "candidates": 0}]
    prints = {on_devices(encoder, num_devices=1, **changes).fingerprint for changes in settings}
    assert len(prints) == 3
    assert on_devices(encoder, num_devices=8, **settings[0]).fingerprint in prints  # of any number of devices


def test_several_threads_search_at_once(encoder):
    retriever = on_devices(encoder)
    expected = retriever.search(QUERIES, 2)
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: retriever.search(QUERIES, 2)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), expected)


def test_of_several_processes_only_the_thread_that_opened_it_may_search(encoder, monkeypatch):
    retriever = on_devices(encoder, num_devices=1)
    monkeypatch.setattr(Mesh, "is_multi_process", property(lambda mesh: True))
    assert retriever.search(QUERIES, 1)
    errors = []

    def search() -> None:
        with pytest.raises(RetrievalError, match="one thread searches, since device programs must start in the same"):
            retriever.search(QUERIES, 1)
        errors.append(True)

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert errors == [True]


def test_bad_vectors_and_failures_are_named(encoder, monkeypatch):
    for vectors, message in (
        (np.ones((4, 3), np.float32), "the vectors of an index have the encoder's size 2; got 3"),
        (np.full((4, 2), np.nan, np.float32), r"vectors must be finite.*Build the index again"),
    ):
        with pytest.raises(UserError, match=message):
            mesh = search_mesh(jax.devices())
            DeviceRetriever(AxisEncoder(), PASSAGES.__getitem__, VectorShards([vectors]), "corpus", mesh=mesh)
    retriever = on_devices(encoder, num_devices=1)
    monkeypatch.setattr(retriever, "_program", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(RetrievalError, match=r"'harbor'.*ZeroDivisionError"):
        retriever.search(["harbor"], 1)


def test_vectors_larger_than_the_memory_are_refused(encoder, monkeypatch):
    class SmallDevice:
        def memory_stats(self):
            return {"bytes_limit": 1000}

    monkeypatch.setattr(Mesh, "local_devices", property(lambda mesh: [SmallDevice()]))
    with pytest.raises(UserError, match=r"each of 1 devices must fit its 0\.00 GiB.*retrieval\.device\.dtype=bfloat16"):
        on_devices(encoder, num_devices=1)


# ---- index directories ----


def test_an_index_of_either_kind_is_searched_on_the_devices(tmp_path):
    device = RetrievalConfig(kind="device", encoder=EncoderConfig(dim=64))
    flat = device.replace(kind="faiss")
    build_index(device, iter(PASSAGES), tmp_path / "device")
    build_index(flat, iter(PASSAGES), tmp_path / "flat")
    expected = open_retriever(flat, tmp_path / "flat").search(QUERIES, 4)
    for name in ("device", "flat"):
        retriever = open_retriever(device, tmp_path / name)
        assert retriever.search(QUERIES, 4) == open_local_retriever(device, tmp_path / name).search(QUERIES, 4)
        assert retriever.search(QUERIES, 4) == expected
    with pytest.raises(UserError, match=r"the encoder must be the one that the index in .* was built with"):
        open_retriever(device, tmp_path / "flat", lambda: HashEncoder(64).fit(["ann sings"]))
    build_index(device.replace(kind="bm25"), iter(PASSAGES), tmp_path / "bm25")
    with pytest.raises(UserError, match=r"must hold an index of retrieval\.kind=device or faiss; got one of bm25"):
        open_retriever(device, tmp_path / "bm25")


def test_given_vectors_are_taken_and_a_given_index_is_refused(tmp_path, encoder):
    config = RetrievalConfig(kind="device", encoder=EncoderConfig(dim=1024))
    encoder = HashEncoder(1024).fit(passage.contents for passage in PASSAGES)
    np.save(tmp_path / "v.npy", encoder.encode([passage.contents for passage in PASSAGES], kind="passage"))
    build_index(config, iter(PASSAGES), tmp_path / "index", given=GivenFiles(vectors=(tmp_path / "v.npy",)))
    assert len(open_retriever(config, tmp_path / "index").search(["harbor"], 2)[0]) == 2
    with pytest.raises(UserError, match=r"retrieval\.kind=device holds vectors: --vectors FILE; got .*e5_Flat\.index"):
        build_index(config, iter(PASSAGES), tmp_path / "x", given=GivenFiles(index=tmp_path / "e5_Flat.index"))


@pytest.mark.parametrize(("key", "value"), [("rollout.search_overlap", "1"), ("rl.async_rollouts", "true")])
def test_what_would_search_in_another_thread_is_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"{key} must be (0|false) when retrieval\.kind is device.*got {value}"):
        load_config(None, ["retrieval.kind=device", f"{key}={value}"])


# ---- encoders of the BERT family, whose model is in the program ----


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BertEncoder:
    path = tmp_path_factory.mktemp("encoder")
    write_model(path, num_hidden_layers=1)
    write_tokenizer(path)
    return BertEncoder(path, pooling="mean", query_prefix="query: ", max_length=40)


TEXTS = [Passage(f"t{i}", f"{a} {b}") for i, (a, b) in enumerate(zip("abcdefghij" * 3, range(30), strict=True))]
SHORT = ["who is b 1", "a", "where is g 26", "c 12 or d 13 " * 9]


@pytest.mark.parametrize(
    ("num_devices", "copies"),
    [(8, 4), pytest.param(8, 1, marks=pytest.mark.slow), pytest.param(1, 1, marks=pytest.mark.slow)],
)
def test_the_program_encodes_the_queries(bert, num_devices, copies):
    """16 queries are divided among 8 devices, 4 are encoded by each of them."""
    queries = [f"{text} {copy}" for text in SHORT for copy in range(copies)]
    found = on_devices(bert, TEXTS, num_devices).search(queries, 3)
    for ours, theirs in zip(found, FaissRetriever.of(bert, TEXTS).search(queries, 3), strict=True):
        assert ids(ours) == ids(theirs)
        np.testing.assert_allclose([hit.score for hit in ours], [hit.score for hit in theirs], atol=2e-6)


def test_batches_of_queries_are_filled_up_to_a_few_shapes(bert):
    batches = list(bert.query_batches(["a"] * 20 + ["b c d e f g h"], (4, 16)))
    assert [(count, tokens.shape, lengths.tolist()) for count, (tokens, lengths) in batches] == [
        (16, (16, 16), [9] * 16),
        (5, (16, 16), [9] * 4 + [15] + [0] * 11),
    ]


def test_devices_share_the_encoders_parameters(bert):
    mesh = search_mesh(jax.devices())
    for ours, theirs in zip(jax.tree.leaves(bert.params_on(mesh)), jax.tree.leaves(bert._everywhere), strict=True):
        pointers = [{shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards} for x in (ours, theirs)]
        assert pointers[0] == pointers[1]
