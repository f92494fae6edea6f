"""Dense retrieval in Milvus: Milvus Lite in a file, a server, or a cluster, all through `pymilvus`.

Milvus holds a row for each passage: its position in the corpus, its vector, and what a filter may name (`id`, `title`,
`num_chars`). The passages themselves stay in the index directory, like those of every other retriever: a hit is the
corpus's passage byte for byte, of any length (a text of Milvus ends at 65,535 bytes), and replies stay small. Milvus
finds candidates; exact inner products with their stored vectors rank them, equal ones by position, so that hits of an
exact index are those of FAISS, and an approximate index is refined.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.clients.endpoint import read_key
from r3rag_jax.config.retrieval import MilvusConfig, RetrievalConfig
from r3rag_jax.errors import UserError
from r3rag_jax.retrieval.base import BuildOptions, Encoder, OnProgress
from r3rag_jax.retrieval.encoders.factory import new_encoder, open_encoder
from r3rag_jax.retrieval.encoding import encode, report
from r3rag_jax.retrieval.fingerprint import corpus_fingerprint, digest
from r3rag_jax.retrieval.manifest import AGAIN, check_files, read_manifest
from r3rag_jax.retrieval.ranked import RankedRetriever, Ranking
from r3rag_jax.retrieval.store import STORE_FILES, PassageStore
from r3rag_jax.types import Passage

LITE_FILE = "milvus.db"  # in the index directory
CHUNK = 1024  # passages of an insert: 3 MB of 768 floats, where Milvus takes 64
SPARE = 8  # candidates beyond k, so that ties at rank k are resolved by position
TIE = 1e-5  # Milvus sums in another order: scores this close may be swapped
MAX_CANDIDATES = 16_384  # of a search, by Milvus
MAX_BYTES = 1024  # of an id, and of a title, which is cut


class MilvusRetriever(RankedRetriever):
    """Searches a collection of Milvus for the largest inner products."""

    def __init__(
        self,
        client: Any,
        collection: str,
        encoder: Encoder,
        passage_at: Callable[[int], Passage],
        num_passages: int,
        config: RetrievalConfig,
        corpus: str,
    ) -> None:
        """
        Args:
            client: `pymilvus.MilvusClient`.
            collection: its name; it is loaded.
            encoder: what the passages were encoded with.
            passage_at: position -> passage.
            num_passages: P.
            corpus: fingerprint of the passages.
        """
        super().__init__(passage_at, cached_queries=config.cached_queries)
        self._client, self._collection, self._encoder = client, collection, encoder
        self._num_passages, self._config = num_passages, config.milvus
        settings = [self._config.index, self._config.index_params, self._config.search_params, self._config.filter]
        self._fingerprint = digest([corpus, encoder.fingerprint, "milvus", *settings])

    @classmethod
    def open(
        cls, config: RetrievalConfig, index_dir: Path, encoder: Callable[[], Encoder] | None = None
    ) -> MilvusRetriever:
        """Connect to Milvus, for the passages of an index directory.

        Raises:
            UserError: Milvus cannot be reached, lacks the collection, refuses the filter, or the index was built with
                another encoder.
        """
        manifest = read_manifest(index_dir)
        if manifest.kind != "milvus":
            raise UserError(f"{index_dir} must hold an index of retrieval.kind=milvus; got one of {manifest.kind}")
        check_files(index_dir, manifest, STORE_FILES)  # Milvus Lite's files change when they are opened
        opened = open_encoder(config, index_dir) if encoder is None else encoder()
        manifest.check_encoder(opened.fingerprint, index_dir)
        name = manifest.depends_on.get("collection", "")
        client = connect(config.milvus, index_dir)
        with milvus_errors(config.milvus):
            if not client.has_collection(name):
                raise UserError(f"Milvus must have the collection {name} of {index_dir}; it has not. {AGAIN}")
            client.load_collection(name, timeout=config.milvus.timeout_s)
            if (count := num_rows(client, name)) != manifest.num_passages:
                raise UserError(
                    f"the collection {name} must have {manifest.num_passages} passages; got {count}. {AGAIN}"
                )
        check_filter(client, name, config.milvus)
        store = PassageStore(index_dir)
        return cls(client, name, opened, store.at, len(store), config, manifest.corpus)

    @staticmethod
    def write_files(
        config: RetrievalConfig, store: PassageStore, directory: Path, options: BuildOptions
    ) -> Mapping[str, str]:
        """Insert the passages into a collection that is named by their content.

        One that has them all is used as it is: a second machine's index of the same corpus inserts nothing. One that
        has a part, of a build that was killed, is completed.
        """
        encoder = options.spread(new_encoder(config, store))
        encoder.save(directory)
        milvus = config.milvus
        content = digest([corpus_fingerprint(store.passages()), encoder.fingerprint, milvus.index, milvus.index_params])
        name = f"{milvus.collection}_{content[:16]}"
        client = connect(milvus, directory)
        try:
            with milvus_errors(milvus):
                if not client.has_collection(name):
                    create_collection(client, name, encoder.dim, milvus)
                client.load_collection(name, timeout=milvus.timeout_s)
                insert_passages(client, name, encoder, store, options.on_progress)
                client.flush(name, timeout=milvus.timeout_s)
        finally:
            close(client, milvus, directory)
        return {"encoder": encoder.fingerprint, "collection": name}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the passages' and the encoder's fingerprints, and of index, search and filter."""
        return self._fingerprint

    def rank(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """See `RankedRetriever.rank`; none for a query without a known feature."""
        if k > MAX_CANDIDATES:
            raise ValueError(f"Milvus finds at most {MAX_CANDIDATES} passages; k is {k}")
        vectors_QD = encode(self._encoder, queries, "query")
        rankings: list[Ranking] = [(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in queries]
        rows, limit = np.flatnonzero(vectors_QD.any(axis=1)).tolist(), min(k + SPARE, MAX_CANDIDATES)
        while rows:
            found = self._candidates(vectors_QD[rows], limit)
            again = []
            for row, (positions_C, vectors_CD) in zip(rows, found, strict=True):
                scores_C = np.einsum("cd,d->c", vectors_CD, vectors_QD[row])
                order = np.lexsort((positions_C, -scores_C))
                rankings[row] = positions_C[order[:k]], scores_C[order[:k]]
                is_whole = len(positions_C) < limit or limit == MAX_CANDIDATES
                if not is_whole and scores_C[order[-1]] >= scores_C[order[k - 1]] - TIE:
                    again.append(row)  # more passages may tie with the last one
            rows, limit = again, min(4 * limit, MAX_CANDIDATES)
        return rankings

    def _candidates(self, vectors_QD: np.ndarray, limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(positions int64 [C], vectors float32 [C, D]) of at most `limit` candidates for each query."""
        replies = self._client.search(
            self._collection, data=list(vectors_QD), anns_field="vector", limit=min(limit, self._num_passages),
            filter=self._config.filter, output_fields=["vector"],
            search_params={"metric_type": "IP", "params": json.loads(self._config.search_params)},
            timeout=self._config.timeout_s,
        )  # fmt: skip
        found = []
        for hits in replies:
            positions_C = np.array([hit["position"] for hit in hits], np.int64)
            vectors = [hit["entity"]["vector"] for hit in hits]
            found.append((positions_C, np.asarray(vectors, np.float32).reshape(len(hits), vectors_QD.shape[1])))
        return found


# ---------------------------------------------------------------- the collection


def create_collection(client: Any, name: str, dim: int, config: MilvusConfig) -> None:
    """A collection of vectors [D] with its index."""
    types = _import_pymilvus().DataType
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("position", types.INT64, is_primary=True)
    schema.add_field("id", types.VARCHAR, max_length=MAX_BYTES)
    schema.add_field("title", types.VARCHAR, max_length=MAX_BYTES)
    schema.add_field("num_chars", types.INT64)
    schema.add_field("vector", types.FLOAT_VECTOR, dim=dim)
    index = client.prepare_index_params()
    parameters = json.loads(config.index_params)
    index.add_index("vector", index_type=config.index, metric_type="IP", params=parameters)
    client.create_collection(name, schema=schema, index_params=index, timeout=config.timeout_s)


def insert_passages(
    client: Any, name: str, encoder: Encoder, store: PassageStore, on_progress: OnProgress | None
) -> None:
    """Insert all passages in order, from the chunk at which an earlier process has ended."""
    done = num_rows(client, name)
    first = done if done == len(store) else done // CHUNK * CHUNK
    report(on_progress, first, len(store))
    for start in range(first, len(store), CHUNK):
        positions = range(start, min(start + CHUNK, len(store)))
        passages = [store.at(position) for position in positions]
        vectors_ND = encode(encoder, [passage.contents for passage in passages], "passage")
        rows = [
            {"position": position, "vector": vector_D, **fields_of(passage)}
            for position, passage, vector_D in zip(positions, passages, vectors_ND, strict=True)
        ]
        # The first chunk may be there in part.
        (client.upsert if start == first and done > first else client.insert)(name, rows)
        report(on_progress, len(rows), len(store))


def fields_of(passage: Passage) -> dict[str, Any]:
    """What a filter may name of a passage.

    Raises:
        UserError: its id is too long for Milvus.
    """
    if len(passage.id.encode()) > MAX_BYTES:
        raise UserError(f"with retrieval.kind=milvus an id has at most {MAX_BYTES} bytes; got {passage.id[:40]!r}…")
    title = passage.title.encode()[:MAX_BYTES].decode(errors="ignore")
    return {"id": passage.id, "title": title, "num_chars": len(passage.contents)}


def num_rows(client: Any, name: str) -> int:
    """Rows of a loaded collection, those that were inserted a moment ago included."""
    return int(client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"])


def check_filter(client: Any, name: str, config: MilvusConfig) -> None:
    """Raise a UserError for a filter that Milvus refuses."""
    if not config.filter:
        return
    from pymilvus.exceptions import MilvusException

    try:
        client.query(name, filter=config.filter, output_fields=["position"], limit=1, timeout=config.timeout_s)
    except MilvusException as error:
        rule = "retrieval.milvus.filter must be an expression of Milvus over position, id, title and num_chars"
        raise UserError(f"{rule}; got {config.filter!r}: {error.message}") from None


# ---------------------------------------------------------------- the connection


def connect(config: MilvusConfig, index_dir: Path) -> Any:
    """A client of `retrieval.milvus.uri`, or of Milvus Lite in the index directory.

    Raises:
        UserError: pymilvus is not installed, Milvus cannot be reached, or another process has the file open.
    """
    pymilvus = _import_pymilvus()
    key = read_key(config.key_env, "retrieval.milvus")
    with milvus_errors(config):
        return pymilvus.MilvusClient(uri=uri_of(config, index_dir), token=key, timeout=config.timeout_s)


def uri_of(config: MilvusConfig, index_dir: Path) -> str:
    """Where Milvus is: a URL, or the path of Milvus Lite's file."""
    return config.uri or str(index_dir.absolute() / LITE_FILE)


def close(client: Any, config: MilvusConfig, index_dir: Path) -> None:
    """Close a client, and Milvus Lite with it, whose files can then be renamed."""
    client.close()
    if not (uri := uri_of(config, index_dir)).startswith("http"):
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(uri)


@contextlib.contextmanager
def milvus_errors(config: MilvusConfig) -> Iterator[None]:
    """Turns what pymilvus raises into a UserError that names the key of the URI."""
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        where = config.uri or f"{LITE_FILE} in the index directory"
        hint = "" if config.uri.startswith("http") else "; Milvus Lite is open in one process at a time"
        raise UserError(f"retrieval.milvus.uri: {where} cannot be used: {error.message}{hint}") from None


def _import_pymilvus() -> Any:
    """pymilvus, imported where it is first needed: other retrievers work without it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries that it imports
            import pymilvus
    except ImportError as error:
        raise UserError(
            f"retrieval.kind=milvus needs the extra milvus: pip install 'r3rag_jax[milvus]' ({error})"
        ) from error
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs the traceback of what it raises
    return pymilvus
