"""Approximate FAISS indexes, hybrid search and given vectors: what they find, and builds that are killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from corpora import encyclopedia, ids

from r3rag_jax.config.retrieval import EncoderConfig, FaissConfig, HybridConfig, RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval import ann
from r3rag_jax.retrieval.base import GivenFiles
from r3rag_jax.retrieval.encoders.hashed import HashEncoder
from r3rag_jax.retrieval.factory import build_index, open_retriever, open_store
from r3rag_jax.retrieval.hybrid import HybridRetriever
from r3rag_jax.retrieval.vectors import VectorShards
from r3rag_jax.types import Passage

PASSAGES = [*encyclopedia(), *(Passage(f"q{i}", f"Hut {i} stands on hill {i % 7}.") for i in range(84))]
QUERIES = [f"Who directed {passage.title}?" for passage in PASSAGES[:216:9]]
FLAT = RetrievalConfig(encoder=EncoderConfig(dim=64))
HNSW = FLAT.replace(faiss=FaissConfig(kind="hnsw"))
IVFPQ = FLAT.replace(faiss=FaissConfig(kind="ivfpq", ivf_lists=4, ivf_probes=3))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """FAISS waits actively for its threads, which is slow where tests run beside each other."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("flat") / "index"
    build_index(FLAT, PASSAGES, directory)
    return directory


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and lists of 120 passages: three segments."""
    monkeypatch.setattr(ann, "SEGMENT", 120)
    monkeypatch.setattr("r3rag_jax.retrieval.encoding.CHUNK", 100)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(("config", "num_files"), [(HNSW, 3), (IVFPQ, 1)])
def test_approximate_hits_are_ranked_by_exact_scores(
    flat: Path, tmp_path: Path, config: RetrievalConfig, num_files: int
) -> None:
    build_index(config, PASSAGES, tmp_path / "index")
    assert len(list((tmp_path / "index").glob("*.faiss"))) == num_files
    vectors = VectorShards.open(tmp_path / "index")
    assert (vectors.dtype, len(list(vectors))) == (np.float16, 3)
    exact, approximate = open_retriever(FLAT, flat), open_retriever(config, tmp_path / "index")
    wanted, found = exact.search(QUERIES, 5), approximate.search(QUERIES, 5)
    shared = [len(set(ids(a)) & set(ids(b))) / 5 for a, b in zip(wanted, found, strict=True)]
    assert np.mean(shared) > 0.9  # 3 of 4 lists are read, 64 of 300 passages are candidates
    for a, b in zip(wanted, found, strict=True):
        scores = {hit.passage.id: hit.score for hit in a}
        assert all(abs(scores[hit.passage.id] - hit.score) < 2e-3 for hit in b if hit.passage.id in scores)  # float16
        assert [hit.score for hit in b] == sorted((hit.score for hit in b), reverse=True)
    assert found == [approximate.search([query], 5)[0] for query in QUERIES]  # batches change nothing
    assert approximate.fingerprint != exact.fingerprint
    auto = config.replace(faiss=config.faiss.replace(kind="auto"))
    assert open_retriever(auto, tmp_path / "index").search(QUERIES, 5) == found
    with pytest.raises(UserError, match=rf"keys that it was built with; .*kind is {config.faiss.kind} there; got flat"):
        open_retriever(FLAT, tmp_path / "index")


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("config", [HNSW, IVFPQ])
def test_a_killed_build_is_continued_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: RetrievalConfig
) -> None:
    build_index(config, PASSAGES, tmp_path / "whole")
    encoded: list[int] = []
    encode, write, written = HashEncoder.encode, ann._write, []

    def counted(self: HashEncoder, texts: list[str], *, kind: str = "query") -> np.ndarray:
        encoded.append(len(texts))
        if sum(encoded) > 200:
            raise KeyboardInterrupt
        return encode(self, texts, kind=kind)

    def killed(index: object, path: Path) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(index, path)

    directory = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(HashEncoder, "encode", counted)
        with pytest.raises(KeyboardInterrupt):
            build_index(config, iter(PASSAGES), directory)
        assert encoded == [100, 100, 100] and not directory.exists()
        encoded.clear()
        patch.setattr(ann, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            build_index(config, iter(PASSAGES), directory)
        assert encoded == [100] and len(written) == 2  # two shards and two FAISS files are there
        encoded.clear()
        patch.setattr(ann, "_write", lambda index, path: (written.append(path.name), write(index, path)))
        build_index(config, iter(PASSAGES), directory)
        assert encoded == [] and len(written) == len(set(written)) >= 3
    assert contents(directory) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "whole"]


def test_what_is_of_another_corpus_or_configuration_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    other = [*PASSAGES[:-1], Passage("q83", "another text")]
    for config, passages in [(HNSW, other), (FLAT.replace(vector_dtype="float16"), PASSAGES)]:
        with monkeypatch.context() as patch:
            patch.setattr(ann, "_write", killed)
            with pytest.raises(KeyboardInterrupt):
                build_index(HNSW, PASSAGES, tmp_path / "index")
        assert (tmp_path / ".index.partial" / "vectors-00000.npy").exists()
        build_index(config, passages, tmp_path / "index")
        build_index(config, passages, tmp_path / "new")
        assert contents(tmp_path / "index") == contents(tmp_path / "new")
        assert not (tmp_path / ".index.partial").exists()


def test_fused_scores_by_hand(tmp_path: Path) -> None:
    config = FLAT.replace(kind="hybrid", hybrid=HybridConfig(rank_constant=10.0, depth=3))
    build_index(config, PASSAGES, tmp_path / "index")
    retriever = open_retriever(config, tmp_path / "index")
    assert isinstance(retriever, HybridRetriever)
    query = "Who composed the music of The Silent Tower?"
    scores: dict[str, float] = {}
    order = {passage.id: position for position, passage in enumerate(PASSAGES)}
    for part in retriever._retrievers:
        for rank, hit in enumerate(part.search([query], 3)[0], 1):
            scores[hit.passage.id] = scores.get(hit.passage.id, 0.0) + 1 / (10 + rank)
    expected = sorted(scores, key=lambda id: (-round(scores[id], 6), order[id]))[:3]
    [hits] = retriever.search([query], 3)
    assert ids(hits) == expected
    np.testing.assert_allclose([hit.score for hit in hits], [scores[id] for id in expected], rtol=1e-6)
    with pytest.raises(UserError, match=r"must hold an index of retrieval\.kind=faiss; got one of hybrid"):
        open_retriever(FLAT, tmp_path / "index")


def test_queries_are_remembered_up_to_the_limit(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retriever = open_retriever(FLAT.replace(cached_queries=2), flat)
    asked: list[list[str]] = []
    rank = type(retriever).rank
    monkeypatch.setattr(type(retriever), "rank", lambda self, q, k: (asked.append(list(q)), rank(self, q, k))[1])
    a, b, c = QUERIES[:3]
    first = retriever.search([a, b, a], 3)
    assert first[0] == first[2] and asked == [[a, b]]  # twice in a batch: searched once
    assert retriever.search([b, a], 3) == [first[1], first[0]]
    retriever.search([c], 3)  # drops b, the least recently used
    retriever.search([a, c], 3)
    retriever.search([b], 3)
    retriever.search([b], 2)  # another k
    assert asked == [[a, b], [c], [b], [b]]


# ---- given vectors and indexes ----


def vectors_of(flat: Path) -> np.ndarray:
    return VectorShards.open(flat).rows(0, len(PASSAGES))


def test_given_vectors_are_used_instead_of_encoding(flat: Path, tmp_path: Path) -> None:
    files = (tmp_path / "a.npy", tmp_path / "b.npy")
    np.save(files[0], vectors_of(flat)[:150])
    np.save(files[1], vectors_of(flat)[150:])
    build_index(FLAT, PASSAGES, tmp_path / "index", given=GivenFiles(vectors=files))
    assert contents(tmp_path / "index") == contents(flat)
    for rows, message in [
        (vectors_of(flat)[:-1], r"one vector of the encoder's size per passage, 300 of 64; got 299 of 64"),
        (vectors_of(flat) * 2, r"a\.npy: the vectors of an index must have norm 1; row 1 has 2"),
        (vectors_of(flat)[::-1], r"what the encoder makes of the passages, each of cosine .*; got .* for passage"),
        (np.arange(4), r"a\.npy must be floats \[n, D\]; got int64"),
    ]:
        np.save(files[0], rows)
        with pytest.raises(UserError, match=message):
            build_index(FLAT, PASSAGES, tmp_path / "other", given=GivenFiles(vectors=files[:1]))
    with pytest.raises(
        UserError, match=r"vectors are given to an index of one of faiss, hybrid, device; got retrieval\.kind=bm25"
    ):
        build_index(FLAT.replace(kind="bm25"), PASSAGES, tmp_path / "other", given=GivenFiles(vectors=files))


def test_an_index_of_others_is_taken_as_it_is(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "e5_Flat.index"
    index = faiss.IndexFlatIP(64)
    index.add(vectors_of(flat))
    faiss.write_index(index, str(path))
    build_index(FLAT, PASSAGES, tmp_path / "index", given=GivenFiles(index=path))
    assert (tmp_path / "index" / "index-00000.faiss").samefile(path)  # linked, not copied
    exact = open_retriever(FLAT, flat)
    assert open_retriever(FLAT, tmp_path / "index").search(QUERIES, 5) == exact.search(QUERIES, 5)
    lists = faiss.index_factory(64, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    lists.train(vectors_of(flat))
    lists.add(vectors_of(flat))
    faiss.write_index(lists, str(path := tmp_path / "e5_IVF.index"))
    build_index(FLAT, PASSAGES, tmp_path / "lists", given=GivenFiles(index=path))
    all_lists = FLAT.replace(faiss=FaissConfig(ivf_probes=4))
    found = open_retriever(all_lists, tmp_path / "lists").search(QUERIES, 5)
    assert [ids(hits) for hits in found] == [ids(hits) for hits in exact.search(QUERIES, 5)]


def test_an_index_of_others_that_does_not_fit_is_refused(flat: Path, tmp_path: Path) -> None:
    path = tmp_path / "e5_Flat.index"

    def refused(index: faiss.Index, vectors: np.ndarray) -> str:
        index.add(np.ascontiguousarray(vectors))
        faiss.write_index(index, str(path))
        with pytest.raises(UserError) as caught:
            build_index(FLAT, PASSAGES, tmp_path / "index", given=GivenFiles(index=path))
        return str(caught.value)

    vectors = vectors_of(flat)
    assert "300 of 64; got 100 of 64" in refused(faiss.IndexFlatIP(64), vectors[:100])
    assert "300 of 64; got 300 of 32" in refused(faiss.IndexFlatIP(32), vectors[:, :32])
    assert "an index of inner products, FAISS's metric 0; got metric 1" in refused(faiss.IndexFlatL2(64), vectors)
    assert "must hold what the encoder makes of the passages" in refused(faiss.IndexFlatIP(64), vectors[::-1])
    other = vectors + 0.1 * np.random.default_rng(0).normal(size=64).astype(np.float32) / 8  # as with another prefix
    assert "got 0.99" in refused(faiss.IndexFlatIP(64), other)
    hnsw = faiss.IndexHNSWFlat(64, 8, faiss.METRIC_INNER_PRODUCT)
    assert "must find passages by the encoder's vectors of them" in refused(hnsw, -vectors)
    path.write_bytes(b"IxFI nothing")
    with pytest.raises(UserError, match=r"e5_Flat\.index must be a FAISS index"):
        build_index(FLAT, PASSAGES, tmp_path / "index", given=GivenFiles(index=path))
    assert not (tmp_path / "index").exists()


def test_two_processes_do_not_build_the_same_index(tmp_path: Path) -> None:
    def passages() -> Iterator[Passage]:
        yield PASSAGES[0]
        with pytest.raises(UserError, match=r"built by one process at a time; another (one )?is building .*index"):
            build_index(FLAT, PASSAGES, tmp_path / "index")
        yield PASSAGES[1]

    build_index(FLAT, passages(), tmp_path / "index")  # not disturbed
    assert len(open_store(tmp_path / "index")) == 2


def test_bm25_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = RetrievalConfig(kind="bm25", memory_gb=1e-6)
    with pytest.raises(
        UserError, match=r"BM25 over \d+ words is built in about .* GiB; got retrieval\.memory_gb=1e-06"
    ):
        build_index(config, PASSAGES, tmp_path / "index")
    assert not list(tmp_path.iterdir())
