"""A dense text encoder that needs no download: TF-IDF over hashed words and letter trigrams.

Feature hashing with signs (Weinberger et al., arXiv 0902.2206): feature f adds its weight to a few of the D coordinates
that a stable hash of f names, with signs from the same hash, so that inner products of the D-vectors estimate the inner
products of the sparse TF-IDF vectors without bias. Left out on purpose: meaning. Synonyms do not match; inflections do, by
their trigrams.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r3rag_jax.errors import UserError

_WORD = re.compile(r"\w+")
_CHUNK = 1024  # texts scattered at once: bounds the float64 scratch to 8 * D * 1024 bytes
_MAX_CACHED_WORDS = 200_000  # a policy in training invents words without end


def words_of(text: str) -> list[str]:
    """Case-folded words without accents: "Émile Zola's" -> ["emile", "zola", "s"]."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in decomposed if not unicodedata.combining(char))
    return _WORD.findall(text.casefold())


def trigrams_of(word: str) -> list[str]:
    """Letter trigrams with word ends marked: "ann" -> ["<an", "ann", "nn>"]."""
    marked = f"<{word}>"
    return [marked[i : i + 3] for i in range(len(marked) - 2)]


def split_title(text: str) -> tuple[str, str]:
    """(title, rest) of FlashRAG contents, whose first line is a title in quotes; ("", text) of any other text."""
    first, newline, rest = text.partition("\n")
    if newline and len(first) > 1 and first[0] == first[-1] == '"':
        return first, rest
    return "", text


class HashEncoder:
    """Texts -> float32 [n, dim]: hashed words and trigrams, weighted by (1 + log tf) * idf, then normalised.

    Args:
        dim: size of the vectors, floats.
        trigram_weight: weight of a word's trigrams together, relative to the word itself.
        title_weight: factor on the words of a passage's title.
        hashes: coordinates per feature; more of them turn rare full collisions into frequent small ones.
    """

    def __init__(
        self,
        dim: int = 1024,
        *,
        trigram_weight: float = 0.5,
        title_weight: float = 1.5,
        hashes: int = 4,
        idf_power: float = 0.5,
        smoothing: float = 1.0,
    ) -> None:
        self._smoothing=smoothing
        self._idf_power = idf_power
        if dim < 1 or hashes < 1:
            raise ValueError(f"dim and hashes must be positive; got dim={dim}, hashes={hashes}")
        if trigram_weight < 0 or title_weight <= 0:
            raise ValueError(
                "trigram_weight must not be negative and title_weight must be positive; "
                f"got {trigram_weight} and {title_weight}"
            )
        self._dim = dim
        self._trigram_weight = float(trigram_weight)
        self._title_weight = float(title_weight)
        self._hashes = hashes
        self._set_counts(0, {}, {})

    @property
    def dim(self) -> int:
        """Size of the vectors, floats."""
        return self._dim

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the settings and of the fitted document frequencies."""
        return self._fingerprint

    def fit(self, texts: Iterable[str]) -> HashEncoder:
        """Count in how many texts each word and each trigram occurs; returns the encoder itself."""
        num_texts = 0
        word_counts: Counter[str] = Counter()
        trigram_counts: Counter[str] = Counter()
        for text in texts:
            num_texts += 1
            words = set(words_of(text))
            word_counts.update(words)
            trigram_counts.update({gram for word in words for gram in trigrams_of(word)})
        if num_texts == 0:
            raise ValueError("an encoder is fitted on at least one text; got none")
        self._set_counts(num_texts, word_counts, trigram_counts)
        return self

    def encode(self, texts: Sequence[str], *, kind: str = "query") -> np.ndarray:
        """float32 [len(texts), dim] of L2 norm 1; all zero where no feature occurs in the fitted corpus.

        Each row depends on its own text alone, to the last bit. Before `fit` every feature weighs the same.
        """
        if isinstance(texts, str):
            raise TypeError(f"encode takes a list of texts; got the single text {texts!r}")
        out_ND = np.zeros((len(texts), self._dim), np.float32)
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            out_ND[start : start + len(chunk)] = self._encode_chunk(chunk, kind == "passage")
        return out_ND

    def save(self, path: str | Path) -> None:
        """Write settings and document frequencies to `path`, a compressed .npz file without pickles."""
        words, word_counts = _to_arrays(self._word_counts)
        trigrams, trigram_counts = _to_arrays(self._trigram_counts)
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                settings=np.frombuffer(self._settings_json().encode(), np.uint8),
                words=words,
                word_counts=word_counts,
                trigrams=trigrams,
                trigram_counts=trigram_counts,
            )

    @classmethod
    def load(cls, path: str | Path) -> HashEncoder:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, or is not an encoder file.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                settings = json.loads(arrays["settings"].tobytes())
                num_texts = settings.pop("num_texts")
                encoder = cls(**settings)
                encoder._set_counts(
                    num_texts,
                    _from_arrays(arrays["words"], arrays["word_counts"]),
                    _from_arrays(arrays["trigrams"], arrays["trigram_counts"]),
                )
        except FileNotFoundError as error:
            raise UserError(f"an encoder is read from an existing file; {path} is missing") from error
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"an encoder file is a .npz written by HashEncoder.save; {path}: {error}") from error
        return encoder

    # ---- features ----

    def _set_counts(
        self, num_texts: int, word_counts: Mapping[str, int], trigram_counts: Mapping[str, int]
    ) -> None:
        self._num_texts = num_texts
        self._word_counts = dict(sorted(word_counts.items()))
        self._trigram_counts = dict(sorted(trigram_counts.items()))
        digest = hashlib.sha256(self._settings_json().encode())
        for counts in (self._word_counts, self._trigram_counts):
            digest.update(json.dumps(counts).encode())
        self._fingerprint = digest.hexdigest()
        total = sum(c * self._idf(self._word_counts, w) ** 2 for w, c in self._word_counts.items())
        self._pad = np.sqrt(self._smoothing * total / max(num_texts, 1))
        self._clear_cache()

    def _settings_json(self) -> str:
        settings: dict[str, Any] = {
            "dim": self._dim,
            "trigram_weight": self._trigram_weight,
            "title_weight": self._title_weight,
            "hashes": self._hashes,
            "num_texts": self._num_texts,
        }
        return json.dumps(settings)

    def _idf(self, counts: Mapping[str, int], feature: str) -> float:
        """log((N + 1) / (df + 1/2)): near 0 for stop words; 0 for unseen features, which can match nothing but noise."""
        if self._num_texts == 0:
            return 1.0
        count = counts.get(feature, 0)
        return float(np.log((self._num_texts + 1) / (count + 0.5)) ** self._idf_power) if count else 0.0

    def _coordinates(self, feature: str) -> tuple[np.ndarray, np.ndarray]:
        """(columns int64, signs float64) of a feature, both [hashes], from one stable digest."""
        digest = hashlib.shake_128(feature.encode()).digest(4 * self._hashes)
        draws = np.frombuffer(digest, "<u4").astype(np.int64)
        return (draws >> 1) % (self._dim - 1), 1.0 - 2.0 * (draws & 1)

    # ---- cached rows: word i owns entries [_starts[i], _starts[i + 1]) of _columns and _values ----

    def _clear_cache(self) -> None:
        self._word_ids: dict[str, int] = {}
        self._starts = np.zeros(1, np.int64)
        self._columns = np.zeros(0, np.int64)
        self._values = np.zeros(0, np.float64)

    def _word_row(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """(columns, values) of a word: its own feature, and its trigrams sharing trigram_weight."""
        grams = trigrams_of(word)
        gram_scale = self._trigram_weight / np.sqrt(len(grams))
        weights = [self._idf(self._word_counts, word)]
        weights += [gram_scale * self._idf(self._trigram_counts, gram) for gram in grams]
        columns, values = [], []
        for feature, weight in zip([f"w:{word}", *(f"g:{g}" for g in grams)], weights, strict=True):
            if weight > 0:
                feature_columns, signs = self._coordinates(feature)
                columns.append(feature_columns)
                values.append(signs * (weight / np.sqrt(self._hashes)))
        if not columns:
            return np.zeros(0, np.int64), np.zeros(0, np.float64)
        return np.concatenate(columns), np.concatenate(values)

    def _cache_words(self, words: Iterable[str]) -> None:
        """Give every new word its row."""
        new = [word for word in dict.fromkeys(words) if word not in self._word_ids]
        if not new:
            return
        rows = [self._word_row(word) for word in new]
        first = len(self._word_ids)
        self._word_ids.update({word: first + i for i, word in enumerate(new)})
        ends = self._starts[-1] + np.cumsum([len(columns) for columns, _ in rows])
        self._starts = np.concatenate([self._starts, ends])
        self._columns = np.concatenate([self._columns, *(columns for columns, _ in rows)])
        self._values = np.concatenate([self._values, *(values for _, values in rows)])

    def _encode_chunk(self, texts: Sequence[str], is_passage: bool) -> np.ndarray:
        """float32 [n, dim]; everything after the splitting into words is vectorised."""
        if len(self._word_ids) > _MAX_CACHED_WORDS:
            self._clear_cache()
        tokens: list[str] = []
        lengths, title_lengths = [], []
        for text in texts:
            title, body = split_title(text) if is_passage else ("", text)
            title_words = words_of(title) if title else []
            body_words = words_of(body)
            tokens += title_words
            tokens += body_words
            title_lengths.append(len(title_words))
            lengths.append(len(title_words) + len(body_words))
        self._cache_words(tokens)
        token_words = np.array([self._word_ids[token] for token in tokens], np.int64)
        token_texts = np.repeat(np.arange(len(texts)), lengths)
        place = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        in_title = place < np.repeat(title_lengths, lengths)

        # One pair per (text, distinct word), in order of first occurrence: so a text's sums do not depend on the cache.
        keys, first, inverse, counts = np.unique(
            token_texts * np.int64(len(self._word_ids) + 1) + token_words,
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        pair_weights = 1.0 + np.log(counts)
        has_title = np.bincount(inverse, in_title, len(keys)) > 0
        pair_weights[has_title] *= self._title_weight
        order = np.argsort(first)
        pair_weights, first = pair_weights[order], first[order]
        pair_texts, pair_words = token_texts[first], token_words[first]

        sizes = self._starts[pair_words + 1] - self._starts[pair_words]
        entry_pairs = np.repeat(np.arange(len(keys)), sizes)
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        entries = self._starts[pair_words][entry_pairs] + offsets
        flat = np.bincount(
            pair_texts[entry_pairs] * self._dim + self._columns[entries],
            self._values[entries] * pair_weights[entry_pairs],
            len(texts) * self._dim,
        )
        vectors_ND = flat.reshape(len(texts), self._dim)
        if is_passage:
            vectors_ND[:, -1] = self._pad
        norms_N1 = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))[:, None]
        return np.divide(vectors_ND, norms_N1, out=np.zeros_like(vectors_ND), where=norms_N1 > 0)


def _to_arrays(counts: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(names as newline-joined UTF-8 bytes, counts int64)."""
    return (
        np.frombuffer("\n".join(counts).encode(), np.uint8),
        np.fromiter(counts.values(), np.int64, len(counts)),
    )


def _from_arrays(names: np.ndarray, counts: np.ndarray) -> dict[str, int]:
    """The inverse of `_to_arrays`."""
    keys = names.tobytes().decode().split("\n") if len(counts) else []
    return dict(zip(keys, counts.tolist(), strict=True))
