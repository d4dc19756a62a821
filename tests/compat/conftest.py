"""The server of tests/openai, for routes of older servers."""

from tests.openai.conftest import client, serve, server

__all__ = ["client", "serve", "server"]
