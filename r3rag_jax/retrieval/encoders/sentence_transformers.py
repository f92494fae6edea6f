"""What the files of a sentence-transformers directory say: tokenizer, longest text, prefixes, pooling.

https://www.sbert.net: modules.json lists the steps from a text to its vector, config_sentence_transformers.json holds
prompts. A directory without them is an ordinary Hugging Face model.
"""

from __future__ import annotations

import re
import reprlib
from pathlib import Path

from tokenizers import Tokenizer

from r3rag_jax.json_text import parse_json, read_json_object
from r3rag_jax.models.encoder import POOLINGS
from r3rag_jax.models.hf.tensor_files import CONFIG_FILE
from r3rag_jax.retrieval.base import TextKind

TOKENIZER_FILE = "tokenizer.json"
MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
# Names of the prompts, in the order in which sentence-transformers looks for them.
PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}
# File -> key of the longest text, in the order in which sentence-transformers looks for them.
LENGTHS = {"sentence_bert_config.json": "max_seq_length", "tokenizer_config.json": "model_max_length"}


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a directory, without padding.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it cannot be read, does not put one special token before and one after a text, or has ids outside
            of the model's vocabulary.
    """
    file = path / TOKENIZER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"its directory must hold {TOKENIZER_FILE}; {path} has none")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no narrower one
        raise ValueError(f"{file} must be a tokenizer: {error}") from error
    tokenizer.no_padding()
    empty = tokenizer.encode("").tokens
    if len(empty) != 2:
        raise ValueError(f"{file} must put one special token before a text and one after it; '' became {empty}")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= vocab_size:  # jax would silently read the last row instead
        raise ValueError(f"{file} must hold ids below the model's vocab_size {vocab_size}; got {largest}")
    return tokenizer


def read_max_length(path: Path, asked: int, max_positions: int) -> int:
    """The longest text in tokens: `asked`, or, if that is 0, the directory's limit.

    Raises:
        ValueError: `asked` is larger than the model's `max_positions`, or too small for any text.
    """
    if asked:
        if not 3 <= asked <= max_positions:
            raise ValueError(f"max_length must be in [3, {max_positions}], or 0 for the encoder's own; got {asked}")
        return asked
    for name, key in LENGTHS.items():
        file = path / name
        limit = read_json_object(file).get(key) if file.is_file() else None
        if limit is not None:
            is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if not is_number or not limit >= 3:
                raise ValueError(f"{file} must hold {key}, at least 3; got {reprlib.repr(limit)}")
            return int(min(limit, max_positions))  # tokenizers without a limit state 1e30
    return max_positions


def read_prefix(path: Path, asked: str, kind: TextKind) -> str:
    """The prefix: `asked`, or, if that is "auto", the prompt in the directory, or "" without one.

    Raises:
        ValueError: the prompt is not a text.
    """
    file = path / PROMPTS_FILE
    if asked != "auto" or not file.is_file():
        return "" if asked == "auto" else asked
    settings = read_json_object(file)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise ValueError(f"{file} must hold prompts, an object; got {reprlib.repr(prompts)}")
    default = settings.get("default_prompt_name")
    names = [*PROMPTS[kind], default] if isinstance(default, str) else PROMPTS[kind]
    name = next((name for name in names if name in prompts), None)
    prompt = "" if name is None else prompts[name]
    if not isinstance(prompt, str):
        raise ValueError(f"{file} must hold prompts as texts; {name!r} is {prompt!r}")
    return prompt


def read_pooling(path: Path, asked: str) -> str:
    """The pooling: `asked`, or, if that is "auto", the one that the directory's files choose.

    Raises:
        ValueError: the files choose none, or one that is not implemented.
    """
    if asked in POOLINGS:
        return asked
    file = path / MODULES_FILE
    if asked != "auto" or not file.is_file():
        raise ValueError(f"pooling must be one of {POOLINGS}, or auto where {MODULES_FILE} names it; got {asked!r}")
    modules = {kind.rpartition(".")[2]: name for kind, name in _read_modules(file)}
    if not {"Pooling"} <= modules.keys() <= {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(f"{file} must name Transformer, Pooling and perhaps Normalize; got {', '.join(modules)}")
    file = path / modules["Pooling"] / CONFIG_FILE
    settings = read_json_object(file)
    mode = settings.get("pooling_mode")  # since version 6 of sentence-transformers; a switch for each pooling before
    switches = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    if mode is None and len(on) == 1:
        mode = switches.get(on[0], on[0])
    if mode not in POOLINGS:
        raise ValueError(f"{file} must choose one pooling of {POOLINGS}; got {mode or on}")
    if not settings.get("include_prompt", True):
        raise ValueError(f"{file}: pooling without the prefix is not implemented; include_prompt is false")
    return mode


def _read_modules(file: Path) -> list[tuple[str, str]]:
    """The class and the folder of each step; raises a ValueError where the file holds something else."""
    rule = f"{file} must list objects with a type and a path in its directory"
    try:
        steps = [(step["type"], step["path"]) for step in parse_json(file.read_text(encoding="utf-8"))]
    except ValueError as error:
        raise ValueError(f"{file} must be JSON; {error}") from error
    except (TypeError, KeyError) as error:
        raise ValueError(f"{rule}: {error}") from error
    for kind, name in steps:
        if not isinstance(kind, str) or not isinstance(name, str) or not re.fullmatch(r"\w*", name):
            raise ValueError(f"{rule}; got {reprlib.repr([kind, name])}")
    return steps
