"""The normal form in which answers are compared."""

from __future__ import annotations

import re
import string

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """The text in lower case, without ASCII punctuation and articles, with one space between words.

    As in the evaluation script of SQuAD (arXiv 1606.05250): "The U.S.,\\tof A" becomes "us of". Letters keep their
    accents, and a text without spaces, such as Chinese, is one word.
    """
    text = text.lower().translate(_DROP_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())
