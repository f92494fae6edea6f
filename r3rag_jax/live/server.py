"""The demo's server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from r3rag_jax.config.serving import DemoConfig
from r3rag_jax.live.app import DemoApplication
from r3rag_jax.live.player import Player
from r3rag_jax.serving.http_server import HttpServer
from r3rag_jax.serving.metrics import RequestMetrics


class DemoServer(HttpServer):
    """Answers the questions of several users with one player; `/readyz` answers 200 once it is open."""

    def __init__(self, open_player: Callable[[], Player], title: str, config: DemoConfig, say: Callable[[str], object]):
        """
        Args:
            open_player: called once, in a thread, while the server shows its page already.
            title: see `DemoApplication`.
            say: see `HttpServer`.

        Raises:
            UserError: see `HttpServer`.
        """
        super().__init__(config, say)
        self._open_player = open_player
        self._player: Player | None = None
        self.application = DemoApplication(title, config, self.token, RequestMetrics())
        self.gate = self.application.gate

    async def open(self) -> str:
        """See `HttpServer.open`."""
        self._player = await asyncio.to_thread(self._open_player)
        self.application.set_player(self._player)
        return "a page for people, /api for programs"

    def close(self) -> None:
        """See `HttpServer.close`."""
        if self._player is not None:
            self._player.close()
