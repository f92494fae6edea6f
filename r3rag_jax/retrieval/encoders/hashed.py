"""A dense text encoder that needs no download: TF-IDF over hashed words, stems and letter trigrams.

Feature hashing with signs (Weinberger et al., arXiv 0902.2206): a feature adds its weight to a few of the D
coordinates, with signs; both come from a stable hash of the feature. So inner products of the D-vectors are unbiased
estimates of those of the sparse TF-IDF vectors. It matches words, not meaning: "director" finds "directed" by its
stem, but "spouse" does not find "married".
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from r3rag_jax.errors import UserError
from r3rag_jax.json_text import parse_json
from r3rag_jax.retrieval.base import TextKind

ENCODER_FILE = "encoder.npz"  # in an index directory
_WORD = re.compile(r"\w+")
_SUFFIX = re.compile(r"(?<=\w{4})(?:ations?|ators?|ings?|ers?|ors?|ied|ies|ed|es|e|s|y)$")
_MIN_IDF = 0.01
_CHUNK = 1024  # texts encoded at once: bounds the float64 scratch memory to 8 * D * 1024 bytes
_MAX_CACHED_WORDS = 200_000  # bounds the memory: a policy in training invents ever new words


def words_of(text: str) -> list[str]:
    """Case-folded words without accents: "Émile Zola's" -> ["emile", "zola", "s"]."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(char for char in decomposed if not unicodedata.combining(char))
    return _WORD.findall(text.casefold())


def stem_of(word: str) -> str:
    """A word without a common suffix, if four letters remain: "directed", "director" -> "direct"."""
    return _SUFFIX.sub("", word)


def trigrams_of(word: str) -> list[str]:
    """Letter trigrams of the word between < and >: "ann" -> ["<an", "ann", "nn>"]."""
    marked = f"<{word}>"
    return [marked[i : i + 3] for i in range(len(marked) - 2)]


def split_title(text: str) -> tuple[str, str]:
    """(title, rest) of contents whose first line is a title in quotes; ("", text) of others."""
    first, newline, rest = text.partition("\n")
    if newline and len(first) > 1 and first[0] == first[-1] == '"':
        return first, rest
    return "", text


class HashEncoder:
    """Texts -> float32 [n, dim]: hashed features weighted by (1 + log tf) * sqrt(idf), of norm 1.

    Queries and passages both have the square root of the idf, so that a shared feature counts its idf once, as in
    BM25. With the whole idf in both, names would outweigh the words that say what is asked about them.

    Before normalisation a passage gets a constant in the last coordinate, which no feature and no query uses. Dividing
    by sqrt(|x|^2 + constant^2) instead of |x| removes the advantage of passages with few rare words, so that the words
    of the query rank the passages of one title.
    """

    def __init__(
        self,
        dim: int = 1024,
        *,
        stem_weight: float = 1.0,
        trigram_weight: float = 0.5,
        title_weight: float = 3.0,
        smoothing: float = 16.0,
        hashes: int = 4,
    ) -> None:
        """
        Args:
            dim: size of the vectors, in floats.
            stem_weight: weight of a word's stem, relative to the word itself.
            trigram_weight: weight of a word's trigrams together, relative to the word itself.
            title_weight: factor on the words of a passage's title.
            smoothing: square of the passages' constant, relative to the mean squared norm of their words.
            hashes: coordinates per feature; with more of them collisions are more frequent and smaller.
        """
        if dim < 2 or hashes < 1:
            raise ValueError(f"dim must be at least 2 and hashes at least 1; got {dim} and {hashes}")
        if min(stem_weight, trigram_weight, title_weight, smoothing) < 0:
            raise ValueError(
                f"weights must not be negative; got {stem_weight=}, {trigram_weight=}, {title_weight=}, {smoothing=}"
            )
        self._settings = {
            "dim": dim,
            "stem_weight": stem_weight,
            "trigram_weight": trigram_weight,
            "title_weight": title_weight,
            "smoothing": smoothing,
            "hashes": hashes,
        }
        self._dim, self._hashes = dim, hashes
        self._stem_weight, self._trigram_weight = stem_weight, trigram_weight
        self._title_weight, self._smoothing = title_weight, smoothing
        self._lock = threading.Lock()  # of the cached rows: searches run in several threads
        self._set_counts(0, {})

    @property
    def dim(self) -> int:
        """Size of the vectors, floats."""
        return self._dim

    @property
    def cosine_kind(self) -> TextKind:
        """Passages are encoded like queries: a passage's constant improves the ranking, but makes cosines small."""
        return "query"

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the settings and of the fitted document frequencies."""
        return self._fingerprint

    def fit(self, texts: Iterable[str]) -> HashEncoder:
        """Count in how many texts each feature occurs; returns the encoder itself.

        Raises:
            ValueError: there are no texts.
        """
        num_texts = 0
        counts: Counter[str] = Counter()
        features_of: dict[str, list[str]] = {}
        for text in texts:
            num_texts += 1
            features: set[str] = set()
            for word in set(words_of(text)):
                if word not in features_of:
                    features_of[word] = [feature for feature, _ in self._features(word)]
                features.update(features_of[word])
            counts.update(features)
        if num_texts == 0:
            raise ValueError("an encoder is fitted on at least one text; got none")
        self._set_counts(num_texts, counts)
        return self

    def encode(self, texts: Sequence[str], *, kind: TextKind = "query") -> np.ndarray:
        """float32 [len(texts), dim] of L2 norm 1; 0 for a query without a feature of the corpus.

        A row depends on its own text alone, bit for bit. Before `fit` all idf are 1.

        Raises:
            TypeError: `texts` is a single text instead of a list.
            ValueError: `kind` is unknown.
        """
        if isinstance(texts, str):
            raise TypeError(f"encode takes a list of texts; got the single text {texts!r}")
        if kind not in ("query", "passage"):
            raise ValueError(f"kind must be 'query' or 'passage'; got {kind!r}")
        out_ND = np.zeros((len(texts), self._dim), np.float32)
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            with self._lock:
                vectors_ND = self._scatter(*self._weighted_words(chunk, kind), len(chunk))
            if kind == "passage":
                vectors_ND[:, -1] = self._passage_constant
            norms_N1 = np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND))[:, None]
            out_ND[start : start + len(chunk)] = vectors_ND / np.where(norms_N1 > 0, norms_N1, 1.0)
        return out_ND

    def save(self, directory: Path) -> None:
        """Write settings and document frequencies to `encoder.npz`, compressed and without pickles."""
        header = json.dumps({"settings": self._settings, "num_texts": self._num_texts})
        with (directory / ENCODER_FILE).open("wb") as file:
            np.savez_compressed(
                file,
                header=np.frombuffer(header.encode(), np.uint8),
                features=np.frombuffer("\n".join(self._counts).encode(), np.uint8),
                counts=np.fromiter(self._counts.values(), np.int64, len(self._counts)),
            )

    @classmethod
    def load(cls, path: str | Path) -> HashEncoder:
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing, or is not an encoder's.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = parse_json(arrays["header"].tobytes())
                features = arrays["features"].tobytes().decode()
                counts = arrays["counts"].tolist()
            encoder = cls(**header["settings"])
            names = features.split("\n") if features else []
            encoder._set_counts(header["num_texts"], dict(zip(names, counts, strict=True)))
        except FileNotFoundError as error:
            raise UserError(f"an encoder is read from an existing file; {path} is missing") from error
        except Exception as error:  # zipfile, zlib and numpy raise what their parsers do
            raise UserError(f"an encoder file is a .npz written by HashEncoder.save; {path}: {error}") from error
        return encoder

    # ---- features ----

    def _features(self, word: str) -> list[tuple[str, float]]:
        """(feature, weight) of a word: the word, its stem, and its trigrams, which share trigram_weight."""
        trigrams = trigrams_of(word)
        share = self._trigram_weight / math.sqrt(len(trigrams))
        return [
            (f"w:{word}", 1.0),
            (f"s:{stem_of(word)}", self._stem_weight),
            *((f"g:{trigram}", share) for trigram in trigrams),
        ]

    def _idf(self, feature: str) -> float:
        """BM25's idf, log((N - df + 1/2) / (df + 1/2)): about 0 for words in more than half of the texts.

        At least _MIN_IDF, so that the words of a corpus of one or two passages count; 0 for features that the corpus
        lacks, which could only match by collision.
        """
        if self._num_texts == 0:
            return 1.0
        count = self._counts.get(feature, 0)
        if count == 0:
            return 0.0
        return max(math.log((self._num_texts - count + 0.5) / (count + 0.5)), _MIN_IDF)

    def _set_counts(self, num_texts: int, counts: Mapping[str, int]) -> None:
        """Set the document frequencies, and everything that is computed from them."""
        self._num_texts = num_texts
        self._counts = dict(sorted(counts.items()))
        header = json.dumps([self._settings, num_texts])
        self._fingerprint = hashlib.sha256((header + json.dumps(self._counts)).encode()).hexdigest()
        words = [feature for feature in self._counts if feature.startswith("w:")]
        mean_squared_norm = sum(self._counts[word] * self._idf(word) for word in words) / max(num_texts, 1)
        self._passage_constant = math.sqrt(self._smoothing * mean_squared_norm)
        self._clear_cache()

    # ---- cached rows: word i has the entries [_starts[i], _starts[i + 1]) of _columns and _values ----

    def _clear_cache(self) -> None:
        self._word_ids: dict[str, int] = {}
        self._starts = np.zeros(1, np.int64)
        self._columns = np.zeros(0, np.int64)
        self._values = np.zeros(0, np.float64)

    def _word_row(self, word: str) -> tuple[np.ndarray, np.ndarray]:
        """(columns int64, values float64) of a word, both [features * hashes]."""
        columns: list[np.ndarray] = [np.zeros(0, np.int64)]
        values: list[np.ndarray] = [np.zeros(0, np.float64)]
        for feature, weight in self._features(word):
            value = weight * math.sqrt(self._idf(feature) / self._hashes)
            if value > 0:
                digest = hashlib.shake_128(feature.encode()).digest(4 * self._hashes)
                bits = np.frombuffer(digest, "<u4").astype(np.int64)
                # The last coordinate is excluded: it holds the passages' constant.
                columns.append((bits >> 1) % (self._dim - 1))
                values.append(value * (1.0 - 2.0 * (bits & 1)))
        return np.concatenate(columns), np.concatenate(values)

    def _cache(self, words: Iterable[str]) -> None:
        """Compute the rows of the words that have none yet."""
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

    def _weighted_words(self, texts: Sequence[str], kind: TextKind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(text, word id, weight) of each text's distinct words, each [pairs], in the order of first occurrence."""
        if len(self._word_ids) > _MAX_CACHED_WORDS:
            self._clear_cache()
        tokens: list[str] = []
        lengths, title_lengths = [], []
        for text in texts:
            title, body = split_title(text) if kind == "passage" else ("", text)
            title_words, body_words = words_of(title), words_of(body)
            tokens += title_words
            tokens += body_words
            title_lengths.append(len(title_words))
            lengths.append(len(title_words) + len(body_words))
        self._cache(tokens)
        token_words = np.array([self._word_ids[token] for token in tokens], np.int64)
        token_texts = np.repeat(np.arange(len(texts)), lengths)
        is_title = _positions_in_groups(lengths) < np.repeat(title_lengths, lengths)
        _, first, inverse, tf = np.unique(
            token_texts * max(len(self._word_ids), 1) + token_words,
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        weights = 1.0 + np.log(tf)
        weights[np.bincount(inverse, is_title, len(first)) > 0] *= self._title_weight
        order = np.argsort(first)  # word ids depend on the texts encoded before, first occurrences do not
        first = first[order]
        return token_texts[first], token_words[first], weights[order]

    def _scatter(self, texts: np.ndarray, words: np.ndarray, weights: np.ndarray, num_texts: int) -> np.ndarray:
        """float64 [num_texts, dim]: the sum of the weighted rows of each text's words."""
        starts = self._starts[words]
        sizes = self._starts[words + 1] - starts
        entries = np.repeat(starts, sizes) + _positions_in_groups(sizes)
        flat = np.bincount(
            np.repeat(texts * self._dim, sizes) + self._columns[entries],
            np.repeat(weights, sizes) * self._values[entries],
            num_texts * self._dim,
        )
        return flat.reshape(num_texts, self._dim)


def _positions_in_groups(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Position of each item in its group, for groups of these sizes: [2, 3] -> [0, 1, 0, 1, 2]."""
    sizes = np.asarray(sizes, np.int64)
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
