"""Sections `retrieval`, `retrieval.encoder`, `retrieval.faiss`, `retrieval.hybrid`, `retrieval.endpoint`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from r3rag_jax.config.device_search import DeviceConfig
from r3rag_jax.config.endpoint import EndpointConfig
from r3rag_jax.config.milvus import MilvusConfig
from r3rag_jax.config.section import Section, key, require, section


class EncoderConfig(Section):
    """The text encoder that turns queries and passages into vectors."""

    dotted: ClassVar[str] = "retrieval.encoder"

    kind: Literal["hash", "bert", "endpoint"] = key(
        "hash",
        "`hash`: TF-IDF of hashed words and letter n-grams, without weights; `bert`: MiniLM, E5, BGE; `endpoint`: a "
        "server with OpenAI's /v1/embeddings",
    )
    path: str = key("", "with kind bert: its Hugging Face directory, or `package:NAME`", "path")
    dtype: Literal["float32", "bfloat16"] = key("float32", "with kind bert: compute dtype")
    max_length: int = key(
        0,
        "longer texts are truncated to this length; 0: the model's limit. With kind endpoint the server truncates, in "
        "the way of vLLM",
        "tokens",
        ge=0,
    )
    batch_tokens: int = key(
        16_384, "with kind bert: size of a batch, padding included; bounds the memory", "tokens", ge=1
    )
    pooling: Literal["auto", "mean", "cls"] = key(
        "auto",
        "with kind bert: how token states become one vector; `auto`: as sentence-transformers' modules.json says",
    )
    query_prefix: str = key(
        "auto",
        "text before every query, e.g. E5's `query: `; `auto`: sentence-transformers' prompt, none with kind endpoint",
    )
    passage_prefix: str = key(
        "auto",
        "text before every passage, e.g. E5's `passage: `; `auto`: as for queries",
    )
    dim: int = key(1024, "with kind hash: size of a vector", "floats", ge=1)
    batch_texts: int = key(32, "with kind endpoint: texts of a request", "texts", ge=1)
    encoding_format: Literal["base64", "float"] = key("base64", "with kind endpoint: how vectors are sent")
    endpoint: EndpointConfig = section(EndpointConfig(), "The server of `retrieval.encoder.kind: endpoint`.")

    @model_validator(mode="after")
    def _check_path(self) -> Self:
        require(
            self.kind != "bert" or self.path != "",
            "retrieval.encoder.path must be given when retrieval.encoder.kind is bert; got none",
            "retrieval.encoder.path",
            "retrieval.encoder.kind",
        )
        require(
            self.kind != "endpoint" or self.endpoint.is_given,
            "retrieval.encoder.endpoint.url must be given when retrieval.encoder.kind is endpoint; got none",
            "retrieval.encoder.endpoint.url",
            "retrieval.encoder.kind",
        )
        return self


class RemoteRetrieverConfig(EndpointConfig):
    """The remote retriever of `retrieval.kind: http`."""

    dotted: ClassVar[str] = "retrieval.endpoint"

    format: Literal["native", "search_r1", "r3rag", "r3rag_batch"] = key(
        "search_r1",
        "what the server speaks: `native`: python -m r3rag_jax.serve; `search_r1`: POST /retrieve; `r3rag`, "
        "`r3rag_batch`: POST /search with one query, or with several",
    )
    retries: int = key(
        8,
        "repeats of a request while no server answers it, after waits that double from 0.5 s to 30 s: 8 bridge 91 s",
        "requests",
        ge=0,
    )
    timeout_s: float = key(60.0, "a request fails unless its whole reply has come after this time", "seconds", gt=0)


class FaissConfig(Section):
    """How FAISS searches the vectors of an index. Keys of 0 are chosen from the number and size of the vectors."""

    dotted: ClassVar[str] = "retrieval.faiss"

    kind: Literal["flat", "hnsw", "ivfpq", "auto"] = key(
        "flat",
        "`flat`: exact; `hnsw`: a graph over vectors of 8 bits; `ivfpq`: inverted lists of product-quantized vectors; "
        "`auto`: the first of them that is fast enough and fits retrieval.memory_gb",
    )
    candidates: int = key(
        0, "with hnsw, ivfpq: passages whose exact inner products decide the ranks; 0: 64, or 4 * k", "passages", ge=0
    )
    hnsw_links: int = key(32, "with hnsw: links of a vector; its lowest level has twice as many", "links", ge=2, le=128)
    hnsw_build_ef: int = key(100, "with hnsw: candidates for the links of a new vector", "vectors", ge=1)
    hnsw_search_ef: int = key(64, "with hnsw: candidates that a search keeps", "vectors", ge=1)
    ivf_lists: int = key(0, "with ivfpq: inverted lists; 0: a power of two near 4 sqrt(P)", "lists", ge=0)
    ivf_probes: int = key(0, "with ivfpq: lists that a search reads; 0: 1/32 of them, at least 16", "lists", ge=0)
    pq_bytes: int = key(0, "with ivfpq: size of a compressed vector; 0: one byte for 8 floats", "bytes", ge=0)


class HybridConfig(Section):
    """Reciprocal-rank fusion of FAISS and BM25 (Cormack et al. 2009): score = sum of 1 / (rank_constant + rank)."""

    dotted: ClassVar[str] = "retrieval.hybrid"

    rank_constant: float = key(60.0, "the larger, the less the first ranks stand out", gt=0)
    depth: int = key(100, "hits of each retriever that are fused, at least k", "passages", ge=1)


class RetrievalConfig(Section):
    """The retriever, and how many passages a trajectory gets from it."""

    dotted: ClassVar[str] = "retrieval"

    kind: Literal["faiss", "bm25", "hybrid", "device", "http", "milvus"] = key(
        "faiss",
        "`faiss`: inner-product search over dense vectors; `bm25`: lexical; `hybrid`: both, by their ranks; "
        "`device`: exact search over dense vectors in the devices' memory; `http`: a remote retriever; "
        "`milvus`: dense vectors in Milvus",
    )
    index_dir: str = key("", "directory of the index; empty: `index` in the run directory", "path")
    top_k: int = key(2, "passages per retrieval", "passages", ge=1)
    passage_tokens: int = key(64, "longer passages are truncated to this length", "tokens", ge=1)
    max_passages: int = key(10, "budget of passages of a trajectory", "passages", ge=1)
    vector_dtype: Literal["auto", "float32", "float16"] = key(
        "auto", "dtype of the stored vectors; `auto`: float32 where FAISS searches exactly, else float16"
    )
    memory_gb: float = key(8.0, "memory that building an index may take, passages in page cache aside", "GiB", gt=0)
    cached_queries: int = key(
        0, "queries whose hits are remembered; 0: none, so that a resumed run makes the same searches", "queries", ge=0
    )
    encoder: EncoderConfig = section(EncoderConfig())
    faiss: FaissConfig = section(FaissConfig())
    hybrid: HybridConfig = section(HybridConfig())
    device: DeviceConfig = section(DeviceConfig())
    milvus: MilvusConfig = section(MilvusConfig())
    endpoint: RemoteRetrieverConfig = section(RemoteRetrieverConfig())

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        require(
            self.max_passages >= self.top_k,
            f"retrieval.max_passages must be at least retrieval.top_k={self.top_k}; got {self.max_passages}",
            "retrieval.max_passages",
            "retrieval.top_k",
        )
        require(
            self.kind != "http" or self.endpoint.is_given,
            "retrieval.endpoint.url must be given when retrieval.kind is http; got none",
            "retrieval.endpoint.url",
            "retrieval.kind",
        )
        return self
