"""The tokenizer class LlamaTokenizer: transformers 5 takes vocabulary and merges of tokenizer.json, and nothing else.

Normalizer, pre-tokenizer and decoder are then those of the class, so `▁` is put before a text by two fields of
tokenizer_config.json and not by tokenizer.json. transformers 4 used tokenizer.json as it is.

    add_prefix_space   legacy             ▁ is put
    true or none       false or none      before a text
    true or none       true               before a text and after each special token
    false              any                nowhere
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


def apply_class(backend: Backend, config: Mapping[str, Any]) -> None:
    """Give a backend the parts of the class, if `config`, tokenizer_config.json, names it.

    A byte-level tokenizer that names the class, as some do by mistake, stays as it is, in transformers as well.
    """
    if config.get("tokenizer_class") not in CLASSES or not isinstance(backend.model, BPE) or _is_byte_level(backend):
        return
    has_space = config.get("add_prefix_space") in (None, True)
    scheme = "never" if not has_space else "always" if config.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_space else steps)
    backend.model.fuse_unk = backend.model.byte_fallback = True


def _is_byte_level(backend: Backend) -> bool:
    parts = [part for part in (backend.pre_tokenizer, backend.decoder) if part is not None]
    return any('"ByteLevel"' in json.dumps(json.loads(part.__getstate__())) for part in parts)
