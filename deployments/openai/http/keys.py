"""API keys: which requests may come in, and which may steer the server."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from starlette.datastructures import Headers

from deployments.config.api import ApiOptions
from deployments.core.errors import AdminKeyRequired, ConfigError, Unauthorized

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_RELOAD_SECONDS = 1.0


class ApiKeys:
    """The digests of the keys that open the API, and of those that open its admin routes as well.

    Raises:
        ConfigError: the file cannot be read, or an entry is not a key.
    """

    def __init__(self, options: ApiOptions) -> None:
        self._fixed = _digests(options.api_keys)
        self._admin = _digests(options.admin_keys)
        self._file = None if options.api_keys_file is None else KeyFile(Path(options.api_keys_file))
        self._required = bool(options.api_keys) or self._file is not None

    def check(self, headers: Headers) -> None:
        """Let a request pass.

        Raises:
            Unauthorized: it brings no key, or one that is not ours.
        """
        if self._required:
            _check(headers, [*self._clients(), *self._admin])

    def check_admin(self, headers: Headers) -> None:
        """Let a request pass that steers the server.

        Raises:
            Unauthorized: it brings no key or an unknown one, or there are no `admin_keys`.
            AdminKeyRequired: its key is a client's.
        """
        if not self._admin:
            raise Unauthorized("Admin routes need an admin key, and this server has none; set api.admin_keys.")
        if _is_among(_given(headers), self._clients()) and not _is_among(_given(headers), self._admin):
            raise AdminKeyRequired("This route needs one of api.admin_keys; the request has the key of a client.")
        _check(headers, self._admin)

    def check_record(self, headers: Headers) -> None:
        """Let a request pass that reads what all clients have sent: an admin's if there are admin keys.

        Raises:
            Unauthorized: it does not bring a key that it needs.
        """
        if self._admin:
            _check(headers, self._admin)
        else:
            self.check(headers)

    def owner(self, headers: Headers) -> str:
        """The digest of a request's key, which its captures belong to; empty if the server has no keys."""
        return hashlib.sha256(_given(headers).encode("utf-8", "surrogateescape")).hexdigest() if self._required else ""

    def _clients(self) -> list[bytes]:
        return [*self._fixed, *(self._file.digests() if self._file is not None else [])]


def is_plain(key: str) -> bool:
    """Whether a key is written as it is sent, and not as its digest."""
    return _DIGEST.fullmatch(key) is None


def as_digests(keys: Iterable[str]) -> list[str]:
    """Keys as `sha256:<hex digest>`, which may be logged.

    Raises:
        ConfigError: an entry is not a key.
    """
    return [f"sha256:{_digest(key).hex()}" for key in keys]


def _check(headers: Headers, known: Sequence[bytes]) -> None:
    given = _given(headers)
    if not given:
        raise Unauthorized("No API key; send the header Authorization: Bearer <key>, or x-api-key: <key>.")
    if not _is_among(given, known):
        raise Unauthorized("Unknown API key, or not one that this route takes.")


def _is_among(given: str, known: Sequence[bytes]) -> bool:
    digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
    # Every digest is compared, so that the time reveals nothing of which one was nearly right.
    return sum(hmac.compare_digest(digest, each) for each in known) > 0


class KeyFile:
    """Keys in a file, one a line; lines that begin with # are comments. Read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._version = self._stat()
            self._digests = self._read()
        except OSError as error:
            raise ConfigError(f"api_keys_file {str(path)!r} cannot be read: {error.strerror}.") from error
        self._looked = time.monotonic()

    def digests(self) -> list[bytes]:
        """The digests of the file's keys, at most a second old; the last good ones while it cannot be read."""
        if time.monotonic() - self._looked >= _RELOAD_SECONDS:
            self._looked = time.monotonic()
            try:
                if (version := self._stat()) != self._version:
                    self._digests, self._version = self._read(), version
                    logger.info("read %d API keys from %s", len(self._digests), self._path)
            except (OSError, ConfigError) as error:
                logger.error("api_keys_file %s is not used: %s", self._path, error)
        return self._digests

    def _stat(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> list[bytes]:
        try:
            text = self._path.read_text(encoding="utf-8-sig")  # a byte order mark is not a part of the first key
        except UnicodeDecodeError as error:
            raise ConfigError(f"api_keys_file {str(self._path)!r} is not a text in UTF-8; save it as UTF-8.") from error
        lines = (line.strip() for line in text.splitlines())
        return _digests(line for line in lines if line and not line.startswith("#"))


def _digests(keys: Iterable[str]) -> list[bytes]:
    return [_digest(key) for key in keys]


def _digest(key: str) -> bytes:
    if not key or key != key.strip():
        raise ConfigError("An API key is empty or has white space around it.")
    if match := _DIGEST.fullmatch(key):
        return bytes.fromhex(match[1])
    if key.startswith("sha256:"):
        raise ConfigError("An API key begins with sha256: but 64 hex digits do not follow.")
    return hashlib.sha256(key.encode()).digest()


def _given(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    if scheme.lower() == "basic" and (password := _password(token.strip())):
        return password
    return headers.get("api-key") or headers.get("x-api-key") or ""


def _password(token: str) -> str:
    """The password of HTTP's basic authentication (RFC 7617), which is how a browser sends a key."""
    try:
        return base64.b64decode(token, validate=True).decode().partition(":")[2].strip()
    except (binascii.Error, UnicodeDecodeError):
        return ""
