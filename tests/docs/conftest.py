"""Servers for the pages' examples."""

from __future__ import annotations

from tests.openai.conftest import serve  # noqa: F401
