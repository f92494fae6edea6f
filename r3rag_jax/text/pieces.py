"""Ids of a text whose pieces differ in trust, and of pieces that continue a text.

Text from outside, a question or a passage, must not spell a special token. And many tokenizers put a space before a
text ("Who" is encoded as "▁Who"), so that a piece encoded by itself has a space that it does not have inside a text:

    whole     ▁The ▁question : ▁Who            pieces     ▁The ▁question :   ▁ ▁Who
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

CACHED_PIECES = 256  # number of pieces whose special tokens are cached

PrefixSpace = Literal["never", "first", "each"]  # before no text, a text, or a text and after each special token


class PieceEncoder:
    """Encodes texts with one backend of the library tokenizers, whose tokens must not change afterwards."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self.prefix_space = _prefix_space(backend)
        added = backend.get_added_tokens_decoder()
        self._specials = {id: token for id, token in added.items() if token.special}
        self._find_specials = functools.lru_cache(CACHED_PIECES)(
            self.specials_in
        )  # templates and labels come again and again

    @functools.cached_property
    def plain(self) -> Backend:
        """A copy of the backend that reads special tokens as ordinary text."""
        return self._copy()

    @functools.cached_property
    def continuing(self) -> Backend:
        """A copy of `plain` that puts no space before a text."""
        return self.plain if self.prefix_space == "never" else self._copy(has_prefix_space=False)

    def _copy(self, *, has_prefix_space: bool = True) -> Backend:
        content = json.loads(self._backend.to_str())
        if not has_prefix_space:
            for name in ("normalizer", "pre_tokenizer"):
                content[name] = _without_prefix_space(content[name])
        copy = Backend.from_str(json.dumps(content))
        copy.encode_special_tokens = True
        return copy

    def encode(self, pieces: Sequence[str], *, continues: bool = False) -> list[int]:
        """Return the ids of the pieces as one text.

        Args:
            pieces: the first and every second one after it may hold special tokens; in the others they stay text.
            continues: the text follows other text, so that no space is put before it.
        """
        if not continues or self.prefix_space == "never":
            text = "".join(pieces)
            encoding = self._backend.encode(text, add_special_tokens=False)
            allowed = [id for piece in pieces[::2] for id, _, _ in self._find_specials(piece)]
            if [id for id, _, _ in self._specials_of(text, encoding)] == allowed:
                return encoding.ids
        return self._encode_segments(pieces, continues)

    def continues_after(self, before: str) -> bool:
        """Whether a text that follows `before` has no space put before it."""
        *_, (segment, _) = self._segments([before])
        return bool(segment) or (bool(before) and self.prefix_space != "each")

    def _encode_segments(self, pieces: Sequence[str], continues: bool) -> list[int]:
        """As `encode`: each text between two special tokens is encoded by itself, as the backend does, too."""
        ids: list[int] = []
        has_space = not continues
        for segment, special in self._segments(pieces):
            if segment:
                backend = self.plain if has_space else self.continuing
                ids += backend.encode(segment, add_special_tokens=False).ids
            if special is not None:
                ids.append(special)
                has_space = self.prefix_space == "each"
        return ids

    def _segments(self, pieces: Sequence[str]) -> Iterator[tuple[str, int | None]]:
        """Yield each text between special tokens with the special token after it, None for the last one."""
        segment, skips_space = "", False
        for number, piece in enumerate(pieces):
            start = 0
            for id, begin, end in self._find_specials(piece) if number % 2 == 0 else ():
                token = self._specials[id]
                segment += piece[start:begin]
                segment = segment.lstrip() if skips_space else segment
                yield (segment.rstrip() if token.lstrip else segment), id
                segment, start, skips_space = "", end, token.rstrip
            segment += piece[start:]
        yield (segment.lstrip() if skips_space else segment), None

    def specials_in(self, text: str) -> list[tuple[int, int, int]]:
        """Return id, start and end of each special token that a text spells."""
        return self._specials_of(text, self._backend.encode(text, add_special_tokens=False))

    def _specials_of(self, text: str, encoding: Encoding) -> list[tuple[int, int, int]]:
        found = zip(encoding.ids, encoding.offsets, strict=True)
        specials = ((id, begin, end) for id, (begin, end) in found if id in self._specials)
        # A character that the vocabulary lacks is the unknown token without being spelled so.
        unknown = getattr(self._backend.model, "unk_token", None)
        return [
            (id, begin, end)
            for id, begin, end in specials
            if self._specials[id].content != unknown or text[begin:end].strip() == unknown
        ]


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer as tokenizer.json writes it."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    members = step.get("normalizers", step.get("pretokenizers", []))
    return [one for member in members for one in _steps(member)]


def _prefix_space(backend: Backend) -> PrefixSpace:
    parts = [part for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    spaces = {_space_of(step) for part in parts for step in _steps(json.loads(part.__getstate__()))}
    return "each" if "each" in spaces else "first" if "first" in spaces else "never"


def _space_of(step: dict[str, Any]) -> PrefixSpace:
    if step["type"] == "Metaspace":
        return (
            "each" if step["prepend_scheme"] == "always" else "first" if step["prepend_scheme"] == "first" else "never"
        )
    return "each" if step["type"] == "Prepend" or step.get("add_prefix_space") else "never"


def _without_prefix_space(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer without what it puts before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return {name: value for name, value in step.items() if name != "add_prefix_space"} | {"prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            members = [_without_prefix_space(member) for member in step[name]]
            return {**step, name: [member for member in members if member is not None]}
    return step
