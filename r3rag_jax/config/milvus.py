"""Section `retrieval.milvus`."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import field_validator

from r3rag_jax.config.endpoint import URL, check_variable
from r3rag_jax.config.redact import redact_url
from r3rag_jax.config.section import Section, key
from r3rag_jax.json_text import parse_json


class MilvusConfig(Section):
    """Milvus, of `retrieval.kind: milvus`."""

    dotted: ClassVar[str] = "retrieval.milvus"

    uri: str = key(
        "",
        "http(s)://host:port of a server or cluster, or a file NAME.db of Milvus Lite; empty: such a file in the index",
        "url or path",
    )
    key_env: str = key("", "environment variable that holds Milvus' token, or user:password; empty: none is sent")
    collection: str = key("r3rag", "name of the collection, which is followed by a digest of its content")
    index: Literal["FLAT", "AUTOINDEX", "HNSW", "IVF_FLAT", "IVF_SQ8", "IVF_PQ", "DISKANN"] = key(
        "FLAT", "index of the vectors; `FLAT` is exact"
    )
    index_params: str = key("{}", 'JSON object of its parameters, e.g. {"M": 16, "efConstruction": 200}')
    search_params: str = key("{}", 'JSON object of a search\'s parameters, e.g. {"ef": 128}')
    filter: str = key(
        "", 'expression of Milvus over position, id, title and num_chars, e.g. title like "The %"; empty: all passages'
    )
    timeout_s: float = key(60.0, "a call fails unless it is answered after this time", "seconds", gt=0)

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str) -> str:
        if uri and URL.fullmatch(uri) is None and ("://" in uri or not uri.endswith(".db")):
            rule = "must be an http(s) URL without user, query or fragment, or a path that ends in .db"
            raise ValueError(f"{rule}; got {redact_url(uri)!r}")
        return uri

    @field_validator("key_env")
    @classmethod
    def _check_key_env(cls, name: str) -> str:
        return check_variable(name)

    @field_validator("collection")
    @classmethod
    def _check_collection(cls, name: str) -> str:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name) is None:
            raise ValueError(f"must be letters, digits and _, at most 100, with no digit first; got {name[:120]!r}")
        return name

    @field_validator("index_params", "search_params")
    @classmethod
    def _check_params(cls, text: str) -> str:
        try:
            is_object = isinstance(parse_json(text), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise ValueError(f"must be a JSON object; got {text[:100]!r}")
        return text
