"""The exceptions of Troupe, and the OpenAI error that each one becomes.

TroupeError                     500 server_error
├── ClientError                 400 invalid_request_error
│   ├── BadRequest              400 invalid_value
│   │   ├── ContextOverflow     400 context_length_exceeded
│   │   ├── UnsupportedParameter 400 unsupported_parameter
│   │   └── TemplateFailed      400 chat_template_error
│   ├── PathNotAllowed          403 path_not_allowed
│   ├── NotFound                404
│   │   ├── ModelNotFound       404 model_not_found
│   │   ├── RouteNotFound       404 route_not_found
│   │   ├── RecordNotFound      404 record_not_found
│   │   ├── CaptureNotFound     404 capture_not_found
│   │   ├── FileMissing         404 file_not_found
│   │   ├── BatchNotFound       404 batch_not_found
│   │   └── BatchesOff          404 batches_off
│   ├── MethodNotAllowed        405 method_not_allowed
│   ├── BodyTimeout             408 body_timeout
│   ├── VersionMismatch         409 version_mismatch
│   ├── NameTaken               409 name_taken
│   ├── BatchEnded              409 batch_ended
│   ├── RouteGone               410 route_gone
│   ├── TooLarge                413 request_too_large
│   ├── UnsupportedMediaType    415 unsupported_media_type
│   └── HeadersTooLarge         431 headers_too_large
├── Unauthorized                401 invalid_api_key
├── AdminKeyRequired            403 admin_key_required
├── Overloaded                  429 overloaded            (Retry-After)
├── ModelError                  500 model_error           (the model or one of its hooks failed)
│   ├── NotFinite               500 model_error
│   ├── BrokenHook              500 model_error
│   └── ModelLoadFailed         500 model_load_failed
├── OutOfMemory                 503 out_of_memory
├── CapturePending              503 capture_pending       (being written: try again)
├── Unavailable                 503 unavailable           (shutting down: try again)
│   └── ReplicaLost             503 unavailable           (its process has ended: try again)
└── LoadTimeout                 504 model_load_timeout

ConfigError is raised while an application is built, before any client can see it.

The shape is OpenAI's: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import itertools
import os
import sysconfig
import traceback
from asyncio import CancelledError
from collections.abc import Iterator
from typing import Any


class TroupeError(Exception):
    """A failure with a message for the client.

    Args:
        message: what went wrong: the thing, the value and the fix.
        param: the request field that caused the error, if there is one.
        code: replaces the class's machine-readable code.
        retry_after: seconds after which the same request may succeed.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    retryable = False

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.code, self.retry_after)


def _rebuild(
    kind: type[TroupeError], message: str, param: str | None, code: str | None, retry_after: float | None
) -> TroupeError:
    error = kind.__new__(kind)
    TroupeError.__init__(error, message, param=param, code=code, retry_after=retry_after)
    return error


class ClientError(TroupeError):
    """The request is refused for what it is."""

    status = 400
    type = "invalid_request_error"


class NotFound(ClientError):
    """There is no such thing, or not for this key."""

    status = 404


class BadRequest(ClientError):
    """The request is wrong. The same request would fail again."""

    code = "invalid_value"


class ContextOverflow(BadRequest):
    """The request needs more positions than the model has.

    AgentBench, litellm and inspect_ai recognize this wording.
    """

    code = "context_length_exceeded"

    def __init__(self, limit: int, asked: int, *, param: str) -> None:
        noun = "messages" if param == "messages" else "prompt"
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, your {noun} resulted in "
            f"{asked} tokens. Please reduce the length of the {noun}.",
            param=param,
        )


class UnsupportedParameter(BadRequest):
    """A known parameter that this model or server cannot honor."""

    code = "unsupported_parameter"


class TemplateFailed(BadRequest):
    """The model's chat template cannot express these messages."""

    code = "chat_template_error"


class Unauthorized(TroupeError):
    """No API key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class AdminKeyRequired(TroupeError):
    """The API key is a client's, and the route takes only admin keys."""

    status = 403
    type = "permission_error"
    code = "admin_key_required"


class PathNotAllowed(ClientError):
    """The model lies where the configuration does not allow models to be added from."""

    status = 403
    code = "path_not_allowed"


class ModelNotFound(NotFound):
    """There is no model of that id or alias.

    Attributes:
        model: the id or alias, if the request names one.
    """

    model = ""

    code = "model_not_found"


class RouteNotFound(NotFound):
    """The path does not exist."""

    code = "route_not_found"


class RecordNotFound(NotFound):
    """The call is not in the record, or calls are not recorded."""

    code = "record_not_found"


class CaptureNotFound(NotFound):
    """There is no such capture of this key, or no longer."""

    code = "capture_not_found"


class FileMissing(NotFound):
    """There is no such file of this key, or no longer."""

    code = "file_not_found"


class BatchNotFound(NotFound):
    """There is no such batch of this key."""

    code = "batch_not_found"


class BatchesOff(NotFound):
    """The server keeps no files and batches."""

    code = "batches_off"


class MethodNotAllowed(ClientError):
    """The path exists, but not with this method."""

    status = 405
    code = "method_not_allowed"


class BodyTimeout(ClientError):
    """The rest of the request's body did not arrive in time."""

    status = 408
    code = "body_timeout"


class VersionMismatch(ClientError):
    """The model no longer has the weights that the request asks for."""

    status = 409
    code = "version_mismatch"


class NameTaken(ClientError):
    """A model cannot be added or removed under a name that belongs to another."""

    status = 409
    code = "name_taken"


class BatchEnded(ClientError):
    """The batch cannot be cancelled: it has ended."""

    status = 409
    code = "batch_ended"


class RouteGone(ClientError):
    """A route of an older server that Troupe does not have. The message names its replacement."""

    status = 410
    code = "route_gone"


class TooLarge(ClientError):
    """The body or one of its parts is larger than the server accepts."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(ClientError):
    """The route does not read the content type of the body."""

    status = 415
    code = "unsupported_media_type"


class HeadersTooLarge(ClientError):
    """The request's headers are larger than the server accepts."""

    status = 431
    code = "headers_too_large"


class Overloaded(TroupeError):
    """The queue has reached its configured limit."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    retryable = True


class ModelError(TroupeError):
    """The model, or a hook of its loader, failed on this request."""

    code = "model_error"


class NotFinite(ModelError):
    """The model's logits for this request are NaN or infinite."""


class BrokenHook(ModelError):
    """A hook of the loader returned a value that breaks its contract (docs/loaders.md)."""


class ModelLoadFailed(ModelError):
    """The loader raised an exception or did not return a model."""

    code = "model_load_failed"


class OutOfMemory(TroupeError):
    """The device had no memory left for this request."""

    status = 503
    code = "out_of_memory"
    retryable = True


class Unavailable(TroupeError):
    """The server cannot answer now, as while it starts or shuts down."""

    status = 503
    code = "unavailable"
    retryable = True


class ReplicaLost(Unavailable):
    """The process that computed the answer has ended."""


class CapturePending(TroupeError):
    """The file of a capture is still being written."""

    status = 503
    code = "capture_pending"
    retryable = True


class LoadTimeout(TroupeError):
    """The loader did not return within the configured time."""

    status = 504
    code = "model_load_timeout"


RAISED_BY_HOOKS = (Exception, SystemExit, GeneratorExit, CancelledError)
"""What a function of a loader can raise. `sys.exit` in it is an error of one request, not the end of the server."""


class ConfigError(ValueError):
    """The configuration names something that does not exist or cannot be used."""


def last_line(error: BaseException) -> str:
    """Returns an exception as one line: its type and the last line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def grammar_error(text: str) -> str:
    """The line of an error of the grammar library that says why."""
    lines = text.strip().splitlines() or ["unknown error"]
    # A regular expression's error has its reason in the last line.
    return (lines[-1].removeprefix("error: ") if lines[0] == "regex parse error:" else lines[0])[:300]


def hook_failure(name: str, error: BaseException, hook: object = None) -> str:
    """What a loader's function raised, and where: the innermost line of the loader's own code."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    code = getattr(getattr(hook, "__wrapped__", hook), "__code__", None)
    # A function that does not take what it is given has not run.
    begins = [] if code is None else [(code.co_filename, code.co_firstlineno)]
    places = [place for place in frames if not place[0].startswith(_NOT_OF_LOADERS)] or begins
    where = f" ({os.path.basename(places[-1][0])}, line {places[-1][1]})" if places else ""
    return f"Hook {name} failed: {last_line(error)}{where}"


_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_NOT_OF_LOADERS = (
    "<",
    *(os.path.join(_HERE, each, "") for each in ("deployments", os.path.join("model_loaders", "prompts"))),
    *(os.path.join(path, "") for path in map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))),
)
_SHOWN = 100


def shown(value: object) -> str:
    """A value for an error message, cut if it is long."""
    text = repr(_head(value, itertools.count()))
    return text if len(text) <= 80 else text[:77] + "..."


def _head(value: object, seen: Iterator[int]) -> object:
    """As much of a value as its first hundred characters show: it may have megabytes."""
    if next(seen) > _SHOWN:
        return None
    if isinstance(value, str | bytes):
        return value[:_SHOWN]
    if type(value) is dict:
        return {_head(key, seen): _head(held, seen) for key, held in itertools.islice(value.items(), _SHOWN)}
    if type(value) is list:
        return [_head(held, seen) for held in value[:_SHOWN]]
    return value
