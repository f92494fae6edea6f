"""How a server is reached over HTTP: the one section for judge, teacher, inference server and remote retriever."""

from __future__ import annotations

import re
from typing import Self

from pydantic import field_validator, model_validator

from r3rag_jax.config.redact import redact_url
from r3rag_jax.config.section import Section, key

URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")  # no user, query or fragment, where a secret could stand
MAX_NAME = 100  # characters of an environment variable's name


def check_variable(name: str) -> str:
    """Returns the name of an environment variable, or the empty text; for field validators."""
    if name and (re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None or len(name) > MAX_NAME):
        raise ValueError("must be the name of an environment variable, not a key itself; got something else")
    return name


class EndpointConfig(Section):
    """An HTTP server, and how it is called."""

    url: str = key("", "base URL, e.g. http://localhost:8000/v1; empty: there is no server", "url")
    replicas: tuple[str, ...] = key(
        (),
        "base URLs of further servers that answer alike: requests take turns, and one that fails is left out a while",
    )
    model: str = key("", "name of the model on the server; empty: the first model that the server lists")
    key_env: str = key("", "environment variable that holds the server's API key; empty: no key is sent")
    max_in_flight: int = key(16, "requests that wait for their reply at the same time", "requests", ge=1)
    requests_per_minute: int = key(0, "rate limit, evenly spaced; 0: no limit", "requests/minute", ge=0)
    retries: int = key(
        6,
        "repeats of a request while no server answers it, after waits that double from 0.5 s to 30 s: 6 bridge 31 s, 8 "
        "91 s, 10 151 s",
        "requests",
        ge=0,
    )
    timeout_s: float = key(120.0, "a request fails unless its whole reply has come after this time", "seconds", gt=0)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if url and URL.fullmatch(url) is None:
            rule = "must be an http(s) URL without user, query or fragment, e.g. http://localhost:8000/v1"
            raise ValueError(f"{rule}; got {redact_url(url)!r}")
        return url

    @field_validator("replicas")
    @classmethod
    def _check_replicas(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not cls._check_url(url):
                raise ValueError("must be a list of URLs; got an empty one")
        return urls

    @model_validator(mode="after")
    def _check_first_url(self) -> Self:
        if self.replicas and not self.url:
            raise ValueError("must have a url where it has replicas; got none")
        return self

    @field_validator("key_env")
    @classmethod
    def _check_key_env(cls, name: str) -> str:
        return check_variable(name)

    @property
    def urls(self) -> tuple[str, ...]:
        """All base URLs, each once, without a slash at the end."""
        return tuple(dict.fromkeys(url.rstrip("/") for url in (self.url, *self.replicas)))

    @property
    def is_given(self) -> bool:
        """Whether there is a server to call."""
        return self.url != ""
