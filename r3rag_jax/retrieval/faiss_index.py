"""TEMPORARY: replaced by the retrieval helper's version."""
from __future__ import annotations
import json
from pathlib import Path
import numpy as np
from r3rag_jax.data.qa import read_passages, write_jsonl
from r3rag_jax.retrieval.base import Hit
from r3rag_jax.retrieval.hash_encoder import HashEncoder

class FaissIndex:
    def __init__(self, encoder, passages, index):
        self.encoder, self.passages, self._index = encoder, passages, index
    @property
    def fingerprint(self): return self.encoder.fingerprint
    @classmethod
    def build(cls, encoder, passages):
        import faiss
        vecs = encoder.encode([p.contents for p in passages], kind="passage")
        index = faiss.IndexFlatIP(encoder.dim); index.add(np.ascontiguousarray(vecs))
        return cls(encoder, list(passages), index)
    def search(self, queries, k):
        if not queries: return []
        s, ids = self._index.search(np.ascontiguousarray(self.encoder.encode(queries)), min(k, len(self.passages)))
        return [[Hit(self.passages[i], float(x)) for i, x in zip(r, sc) if i >= 0] for r, sc in zip(ids, s)]
    def save(self, d):
        import faiss
        d = Path(d); d.mkdir(parents=True, exist_ok=True)
        faiss.write_index(self._index, str(d / "index.faiss"))
        write_jsonl(d / "passages.jsonl", [{"id": p.id, "contents": p.contents} for p in self.passages])
        self.encoder.save(d / "encoder.npz"); (d / "fingerprint.json").write_text(json.dumps({"f": self.fingerprint}))
    @classmethod
    def load(cls, d):
        import faiss
        d = Path(d)
        return cls(HashEncoder.load(d / "encoder.npz"), read_passages(d / "passages.jsonl"), faiss.read_index(str(d / "index.faiss")))
