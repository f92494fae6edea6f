"""Tiny encoders of the BERT family as files, and what transformers computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from r3rag_jax.models.encoder import HF_NAMES, BertConfig, param_shapes

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS), *".:?'\",-!()"]
SIZES = {
    "vocab_size": len(VOCAB) + 3,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
TEXTS = ["ann sings", "", "Who wrote it?", "bo 1930 " * 9, "a", "the silver harbor, a film", "x y z " * 40, "ann sings"]


def write_model(path: Path, prefix: str = "", **changes: Any) -> None:
    """A random model in which no norm is one, no bias is zero and attention is far from uniform."""
    hf = {**SIZES, "model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", **changes}
    config = BertConfig.from_hf(hf)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in param_shapes(config).items():
        for i in range(config.num_layers if "{i}" in HF_NAMES[name] else 1):
            one = shape[1:] if "{i}" in HF_NAMES[name] else shape
            one = one[::-1] if name.endswith("_proj") else one
            spread = 0.16 if len(one) == 2 else 0.3
            tensor = name.endswith("_scale") + spread * rng.standard_normal(one)
            tensors[prefix + HF_NAMES[name].format(i=i)] = tensor.astype(np.float32)
    D = config.hidden_size
    tensors |= {f"{prefix}pooler.dense.weight": np.eye(D, dtype=np.float32)}
    tensors |= {f"{prefix}pooler.dense.bias": np.zeros(D, np.float32)}
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(hf))


def hf_model(path: Path) -> Any:
    """transformers' model of a directory."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from transformers import BertModel

    return BertModel.from_pretrained(path, dtype=torch.float32).eval()


def hf_states(model: Any, tokens: Any) -> np.ndarray:
    """[B, L, D], the states of its last layer."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens)).last_hidden_state.numpy()


def write_tokenizer(path: Path, **changes: Any) -> None:
    """WordPiece over letters, with BERT's normaliser and special tokens; it asks for padding and truncation."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {token: i for i, token in enumerate(changes.get("vocab", VOCAB))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if changes.get("special", True):
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
        )
    backend.enable_truncation(7)
    backend.enable_padding(length=7)
    backend.save(str(path / "tokenizer.json"))


def write_pooling(
    path: Path, modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"), **pooling: Any
) -> None:
    """The files of sentence-transformers that say how states become a vector."""
    folders = {"Transformer": ""}
    steps = [{"type": f"sentence_transformers.models.{m}", "path": folders.get(m, f"1_{m}")} for m in modules]
    (path / "modules.json").write_text(json.dumps(steps))
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | pooling))


def edit(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def assert_near(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return np.einsum("nd,nd->n", ours.astype(np.float64), theirs.astype(np.float64)) / norms


def hf_vectors(path: Path, texts: list[str], pooling: str, max_length: int) -> np.ndarray:
    """What sentence-transformers computes, one text at a time: no padding."""
    model = hf_model(path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = []
    for text in texts:
        states = hf_states(model, [tokenizer(text, truncation=True, max_length=max_length)["input_ids"]])[0]
        rows.append(states.mean(axis=0) if pooling == "mean" else states[0])
    return np.stack(rows)
