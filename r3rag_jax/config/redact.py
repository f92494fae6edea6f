"""What an error may repeat of a value in which a secret could stand."""

from __future__ import annotations

import re

HIDDEN = "…"
# Last words of keys, real or misspelt, whose value may be a secret.
SECRET_NAME = re.compile(r"key|token(?!s)|secret|passw|credential|auth", re.IGNORECASE)
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")  # the usual form of an environment variable's name, which no key has


def redact_url(text: str) -> str:
    """A text without what stands for user and password, query and fragment where it is a URL.

    http://me:secret@host/v1?api_key=secret -> http://…@host/v1…
    """
    address, mark, _ = re.match(r"([^?#]*)([?#]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    head, scheme, rest = address.rpartition("://")
    user, at, host = rest.rpartition("@")
    hidden_user = HIDDEN + at if user or at else ""
    return f"{head}{scheme}{hidden_user}{host}{HIDDEN if mark else ''}"


def redact_override(text: str) -> str:
    """A word `key=value` of the command line as an error repeats it; a word without a value stays as it is."""
    name, equals, value = text.partition("=")
    last = name.rpartition(".")[2]
    if not equals:
        return redact_url(text) if "://" in text else text
    if SECRET_NAME.search(last) and VARIABLE.fullmatch(value.strip()) is None:
        value = HIDDEN
    elif "url" in last.lower() or "://" in value:
        value = redact_url(value)
    return f"{name}={value}"
