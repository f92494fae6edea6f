"""A request that the server does not carry out: the status, and the rule in a sentence."""

from __future__ import annotations

import json


class Refusal(Exception):
    """Raised anywhere between a request's first byte and its search."""

    def __init__(self, status: int, rule: str, *, retry_after_s: int | None = None):
        """`retry_after_s`: when the client may ask again; sent as a header."""
        super().__init__(rule)
        self.status, self.rule, self.retry_after_s = status, rule, retry_after_s

    @property
    def body(self) -> bytes:
        """JSON of ASCII alone, whatever the rule quotes."""
        return json.dumps({"detail": self.rule}).encode()

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers | ({"retry-after": str(self.retry_after_s)} if self.retry_after_s is not None else {})


def busy(reason: str) -> Refusal:
    """The server cannot search now, and may a moment later; clients repeat the request."""
    return Refusal(503, reason, retry_after_s=1)
