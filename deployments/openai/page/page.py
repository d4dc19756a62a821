"""The page at `/` for browsers: files of this package, which need no key and say nothing about the models.

Every answer has a Content-Security-Policy (https://www.w3.org/TR/CSP3/) that allows only files and requests of the
same origin, and no script or style inside a document.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.openai.http.paths import TidyPaths, accepts, route_path
from deployments.openai.http.route import Route

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_FILE = re.compile(r"(?:/models/.+)?/page/([\w./-]+)")
_MODEL = re.compile(r"/models/(.+)")


class PageMiddleware:
    """ASGI middleware that answers browsers before any key is checked; it has nothing but its own files.

    Args:
        paths: how paths are read, as for the routes.
        routes: of the API; their paths under a model's own path are never the page.
    """

    def __init__(self, app: ASGIApp, paths: TidyPaths, routes: Sequence[Route]) -> None:
        self._app = app
        self._paths = paths
        scoped = {f"{version}{route.path}" for route in routes if route.scoped for version in ("", "/v1")}
        self._routes = tuple(scoped)
        self._files = StaticFiles(directory=STATIC)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            answer = await self._answer(scope)
        await (answer or self._app)(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response | None:
        path = self._paths.path(route_path(scope))
        if file := _FILE.fullmatch(path):
            return await self._file(file[1], scope)
        if not accepts(scope, "text/html"):
            return None
        if path == "/":
            return document("index.html", scope)
        if (model := _MODEL.fullmatch(path)) and not path.endswith(self._routes):
            return document("index.html", scope, model=model[1], root="../" * path.count("/"))
        return None

    async def _file(self, name: str, scope: Scope) -> Response | None:
        try:
            response = await self._files.get_response(name, scope)
        except HTTPException:
            return None
        response.headers.update(HEADERS)
        return response


def document(name: str, scope: Scope, *, model: str = "", root: str = "") -> Response:
    """One of the HTML files.

    Args:
        model: the only model of this page; empty for all.
        root: the path from the page's base to the application's.
    """
    text = (STATIC / name).read_text(encoding="utf-8")
    for key, value in (("base", _base(scope)), ("model", model), ("root", root)):
        text = text.replace(f"{{{{{key}}}}}", html.escape(value))
    return HTMLResponse(text, headers=HEADERS)


def _base(scope: Scope) -> str:
    """What the page's links are relative to: the path as the browser has it, as a folder.

    Relative, because a proxy may serve the application under a prefix that it does not tell.
    """
    raw = scope.get("raw_path") or scope["path"].encode()
    last = raw.partition(b"?")[0].decode("latin-1").rpartition("/")[2]
    return f"./{last}/" if last else "./"
