"""Tokenizer and chat template from Hugging Face files.

It needs only `tokenizers` and Jinja, since the files are self-contained; importing `transformers` would add seconds to
every start.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as _Backend
from tokenizers.models import Unigram

from r3rag_jax.errors import UserError
from r3rag_jax.run.files import write_text
from r3rag_jax.text.chat_template import CONTENT, ChatTemplate
from r3rag_jax.text.llama_tokenizer import apply_class
from r3rag_jax.text.pieces import PieceEncoder
from r3rag_jax.text.tokenizer_files import CONFIG_FILE, SPECIAL_KEYS, TEMPLATE_FILE, TokenizerSettings, read_object

TOKENIZER_FILE = "tokenizer.json"
MAX_VOCABULARY = 1 << 24  # ids
GENERATION_FILE = "generation_config.json"


class Tokenizer:
    """Text to token ids and back, with the chat template of the model."""

    def __init__(self, path: str | Path, *, chat_template: str | None = None):
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a directory.

        Args:
            chat_template: text of a Jinja template that replaces the directory's; `save` writes it.

        Raises:
            FileNotFoundError: the directory has no tokenizer.json.
            ValueError: a file is damaged.
        """
        self._path = Path(path)
        file = self._path / TOKENIZER_FILE
        if not file.is_file():
            raise FileNotFoundError(f"a tokenizer directory must hold {TOKENIZER_FILE}; {path} has none")
        try:
            self._backend = _Backend.from_file(str(file))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{file} must be a tokenizer of the library tokenizers: {error}") from error
        if isinstance(self._backend.model, Unigram):
            raise ValueError(
                f"{file} must hold a model of type BPE; got Unigram, which finds special tokens in any text, also from "
                "outside"
            )
        if not 0 < self.vocab_size <= MAX_VOCABULARY:  # the library goes through all numbers up to the largest id
            raise ValueError(f"{file} must have ids below {MAX_VOCABULARY}; got up to {self.vocab_size - 1}")
        ids = self._backend.get_vocab(with_added_tokens=False).values()
        if len(set(ids)) != len(ids):  # the library writes one token for an id, and cannot read what it has written
            raise ValueError(f"{file} must have a token for each id; {len(ids) - len(set(ids))} ids have several")
        unknown = getattr(self._backend.model, "unk_token", None)
        if unknown is not None and self._backend.token_to_id(unknown) is None:
            raise ValueError(f"{file} must have its unk_token in the vocabulary; got {unknown!r}")
        # A file may ask for truncation and padding; both would silently change the ids.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._settings = TokenizerSettings(self._path)
        apply_class(self._backend, self._settings.fields)
        self._add_tokens_of_settings()
        text = self._settings.template if chat_template is None else chat_template
        self._template = None if text is None else ChatTemplate(text)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_id(self) -> int:
        """The id of the end-of-sequence token; see `end_ids` for what ends a completion.

        Raises:
            UserError: the files name no eos_token, or one that the vocabulary lacks.
        """
        if (id := self._special_id("eos_token")) is None:
            raise self._error(
                f"{CONFIG_FILE} must name an eos_token; it names none: write the token of {TOKENIZER_FILE} that ends a "
                "text or turn"
            )
        return id

    @property
    def bos_id(self) -> int | None:
        """The id that starts a text, or None when the model has none.

        Raises:
            UserError: the files name one that the vocabulary lacks.
        """
        return self._special_id("bos_token")

    @property
    def pad_id(self) -> int:
        """The id for padding: pad_token, or eos_id when the files name none.

        Raises:
            UserError: the files name one that the vocabulary lacks, or neither of them.
        """
        id = self._special_id("pad_token")
        return self.eos_id if id is None else id

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """All ids that end a completion, each once; the one that a policy learns to write comes first.

        They are the token that the chat template puts behind an assistant turn, eos_token, and `eos_token_id` of
        generation_config.json, of which each may name others: Llama 3.1 Instruct lists three.

        Raises:
            UserError: the files name none, or `eos_token_id` of generation_config.json is neither an id nor a list of
                ids.
        """
        return self._known_end_ids() or (self.eos_id,)

    @property
    def turn_end_id(self) -> int:
        """The id that ends an assistant turn in training data: the first of `end_ids`."""
        return self.end_ids[0]

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a completion without the token that ended it, if it is one of `end_ids`."""
        return list(ids[:-1] if len(ids) and ids[-1] in self.end_ids else ids)

    def complete_generation(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the contents of a generation_config.json with the ids that it lacks, so that all `end_ids` stop."""
        known = {f"{key}_id": self._known_id(key) for key in ("bos_token", "eos_token", "pad_token")}
        completed = {key: id for key, id in known.items() if id is not None} | dict(generation)
        ends = tuple(dict.fromkeys((*self._generation_eos_ids(), *self._known_end_ids())))
        return completed | ({"eos_token_id": ends[0] if len(ends) == 1 else list(ends)} if ends else {})

    def check_special_tokens(self) -> None:
        """Check that training and sampling have the ids that they need.

        Raises:
            UserError: see `eos_id` and `pad_id`.
        """
        for key in ("eos_token", "pad_token"):
            self._special_id(key)
        _ = self.eos_id

    def encode(self, text: str, *, allow_special: bool = True, continues: bool = False) -> list[int]:
        """Return the ids of a text, those that `AutoTokenizer` of transformers 5 gives; none is added.

        Args:
            allow_special: special tokens written in the text become their ids. Pass False for text
                from outside (passages, questions), so that a document that spells a control token
                stays a document.
            continues: the text follows other text: a tokenizer that puts a space before a text (`▁Who`) puts none.
        """
        if continues and self._pieces.prefix_space != "never":
            return self._pieces.encode([text] if allow_special else ["", text], continues=True)
        backend = self._backend if allow_special else self._pieces.plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[str], *, continues: bool = False) -> list[int]:
        """Return the ids of the pieces as one text, in which only the first piece and every second one after it may
        hold special tokens: a piece between them that spells one stays text.

        Args:
            continues: see `encode`.
        """
        return self._pieces.encode(pieces, continues=continues)

    def continues_after(self, before: str) -> bool:
        """Whether a text that follows `before` is encoded as `encode` does with `continues`."""
        return self._pieces.continues_after(before)

    def encoding(self, text: str) -> Encoding:
        """Return the ids of a text that continues another, with the characters (`offsets`) and the word (`word_ids`) of
        each; special tokens stay text.
        """
        return self._pieces.continuing.encode(text, add_special_tokens=False)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @property
    def pipeline(self) -> dict[str, Any]:
        """Normalizer, pre-tokenizer, model and added tokens as in tokenizer.json, without vocabulary and merges."""
        content = json.loads(self._backend.to_str())
        parts = {name: content[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        for name in ("vocab", "merges"):
            parts["model"].pop(name, None)
        return parts

    @functools.cached_property
    def _pieces(self) -> PieceEncoder:
        return PieceEncoder(self._backend)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of ids, with special tokens written out unless skipped."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_prompt(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt for a server that encodes it again, special tokens written out.

        Where ordinary tokens spell a special one, which the server would take for it, a space is put into the spelling:
        a passage with `<|im_end|>` is sent with `< |im_end|>`.

        Raises:
            UserError: that helps nothing, e.g. with a special token of one letter.
        """
        text, specials = self.decode(ids), self.special_ids
        if [id for id in self.encode(text) if id in specials] == [id for id in ids if id in specials]:
            return text
        runs = itertools.groupby(ids, key=specials.__contains__)
        return "".join(self.decode(list(run)) if is_special else self._unspelled(list(run)) for is_special, run in runs)

    def _unspelled(self, ids: Sequence[int]) -> str:
        """The text of ordinary tokens with a space in each special token that it spells."""
        text = self.decode(ids)
        for token in {self.decode([id]) for id, _, _ in self._pieces.specials_in(text)}:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        if found := self._pieces.specials_in(text):
            token = self.decode([found[0][0]])
            raise self._error(f"a prompt that spells its special token {token!r} cannot be sent as text")
        return text

    def end_of(self, strings: Sequence[str], ids: Sequence[int]) -> int:
        """Number of leading ids whose text completes the first occurrence of any of the strings; 0 if there is none.

        A string may begin and end within tokens: `.\\n` is one token in many vocabularies.
        """

        def spells(count: int) -> bool:
            text = self.decode(ids[:count])
            return any(string in text for string in strings)

        return bisect.bisect_left(range(len(ids) + 1), True, key=spells) if spells(len(ids)) else 0

    def __contains__(self, token: str) -> bool:
        """Whether the vocabulary has this exact token."""
        return self._backend.token_to_id(token) is not None

    def token_id(self, token: str) -> int:
        """Return the id of one token.

        Raises:
            KeyError: the vocabulary has no such token.
        """
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise KeyError(f"token must be in the vocabulary of {self._path}; got {token!r}")
        return token_id

    def tokens_from(self, start: int) -> dict[str, str]:
        """Return the tokens with ids from `start` on, and the text of each."""
        added = self._backend.get_added_tokens_decoder()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return {token: token if id in added else self.decode([id]) for token, id in vocabulary.items() if id >= start}

    def add_special_tokens(self, tokens: Sequence[str]) -> int:
        """Make each string a special token; returns the number of tokens added to the vocabulary."""
        for name in ("end_ids", "_pieces"):  # cached
            self.__dict__.pop(name, None)
        added = [AddedToken(token, special=True, normalized=False) for token in tokens]
        return self._backend.add_special_tokens(added)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation under the model's chat template.

        Args:
            messages: dictionaries with `role` and `content`.
            add_generation_prompt: whether to end with the opening of an assistant turn.

        Raises:
            UserError: the files hold no template, or the template is not valid or refuses the messages.
        """
        if self._template is None:
            raise self._error(
                f"it must have a chat template, as {TEMPLATE_FILE} or in {CONFIG_FILE}; it has none: "
                "model.chat_template=chatml or llama3"
            )
        specials = {key: token for key in SPECIAL_KEYS if (token := self._settings.special(key)) is not None}
        try:
            return self._template.render(messages, specials, add_generation_prompt=add_generation_prompt)
        except ValueError as error:
            raise self._error(f"its chat template refuses the messages: {error}") from error

    def frame_of_user_message(self, turns: Sequence[Mapping[str, str]] = ()) -> tuple[str, str]:
        """Return what the chat template writes before and after a user message that follows `turns`.

        Raises:
            UserError: the template does not show the content of a user message exactly once and unchanged.
        """
        text = self.render_chat([*turns, {"role": "user", "content": CONTENT}])
        if (count := text.count(CONTENT)) != 1:
            raise self._error(
                f"its chat template must show the content of a user message once and unchanged; it does so {count} "
                "times: model.chat_template=chatml or llama3"
            )
        before, _, after = text.partition(CONTENT)
        return before, after

    def strip_content(self, text: str) -> str:
        """Return the content of a user message as the chat template shows it: stripped where the template strips."""
        strips_start, strips_end = self._strips
        text = text.lstrip() if strips_start else text
        return text.rstrip() if strips_end else text

    @functools.cached_property
    def _strips(self) -> tuple[bool, bool]:
        """Whether the chat template strips a content's start and its end."""
        text = self.render_chat([{"role": "user", "content": f"\t{CONTENT}\t"}])
        return f"\t{CONTENT}" not in text, f"{CONTENT}\t" not in text

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of a conversation under the model's chat template; see render_chat."""
        return self.encode(self.render_chat(messages, add_generation_prompt))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to directory `path`, in the files that this class and transformers read."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / TOKENIZER_FILE, self._backend.to_str(pretty=True))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings.fields}
        # added_tokens_decoder duplicates tokenizer.json and would hide tokens added by add_special_tokens.
        config.pop("added_tokens_decoder", None)
        if self._template is not None:
            config["chat_template"] = self._template.text
        text = json.dumps(config, indent=2, ensure_ascii=False)
        write_text(path / CONFIG_FILE, text + "\n")

    def _error(self, rule: str) -> UserError:
        """Return the error of a directory that breaks a rule."""
        return UserError(f"the model at {self._path} cannot be read: {rule}")

    def _special_id(self, key: str) -> int | None:
        """Return the id of a special token, or None if the files do not name it."""
        token, id = self._settings.special(key), self._known_id(key)
        if token is not None and id is None:
            raise self._error(f"{key} of {CONFIG_FILE} must be a token of {TOKENIZER_FILE}; got {token!r}")
        return id

    def _known_end_ids(self) -> tuple[int, ...]:
        """Return `end_ids`, empty if the files name none."""
        known = (self._turn_end_id(), self._known_id("eos_token"), *self._generation_eos_ids())
        return tuple(dict.fromkeys(i for i in known if i is not None))

    def _known_id(self, key: str) -> int | None:
        """Return the id of a special token, or None if the files do not name it or the vocabulary lacks it."""
        token = self._settings.special(key)
        return None if token is None else self._backend.token_to_id(token)

    def _generation_eos_ids(self) -> list[int]:
        """Return `eos_token_id` of generation_config.json as a list."""
        file = self._path / GENERATION_FILE
        value = read_object(file).get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise self._error(f"eos_token_id of {file.name} must be an id or a list of ids; got {value!r}")
        return ids

    def _turn_end_id(self) -> int | None:
        """Return the special token that the chat template puts behind an assistant turn, or None if there is none."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": CONTENT}]
        try:
            _, content, behind = self.render_chat(turns, add_generation_prompt=False).rpartition(CONTENT)
        except ValueError:  # no template, or one that is for user messages alone
            return None
        ids = self.encode(behind.lstrip())[:1] if content else []
        return next((i for i in ids if i in self._backend.get_added_tokens_decoder()), None)

    def _add_tokens_of_settings(self) -> None:
        """Make tokens that only the settings name added tokens, as transformers does.

        They are those of `added_tokens_decoder` and additional special tokens, and named special tokens that are in the
        vocabulary without being marked as special in tokenizer.json.
        """
        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        for token in self._settings.added_tokens(self._backend.get_vocab(with_added_tokens=True)):
            if token.content not in known:
                known.add(token.content)
                self._backend.add_tokens([token])
