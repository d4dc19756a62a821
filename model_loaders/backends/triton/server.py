"""A model on a Triton server: what it takes, and one request to it. The protocol is the KServe inference protocol v2.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_grpc.md
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.core.errors import (
    ContextOverflow,
    ModelError,
    ModelLoadFailed,
    Overloaded,
    TroupeError,
    Unavailable,
    last_line,
)

try:
    import grpc
    from tritonclient.grpc import aio
    from tritonclient.utils import InferenceServerException, triton_to_np_dtype
except ImportError as error:
    raise ModelLoadFailed("The Triton client is missing: pip install 'troupe-serve[triton]'.") from error

Arrays = Mapping[str, npt.NDArray[Any]]

# A server that comes back is found again within this time; gRPC would wait up to two minutes.
_RECONNECT_MS = 1000
_ASK_S = 5.0
_TOO_LONG = re.compile(r"Prompt length \((\d+)\) exceeds maximum input length \((\d+)\)")
_GONE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")
_NOT_READY = ("is not ready", "not ready", "shutting down", "unavailable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What the served model takes.

    Attributes:
        inputs: the tensors' names and their data types, in Triton's words.
        decoupled: it answers a request with any number of responses.
        batched: its tensors begin with a batch dimension.
    """

    inputs: Mapping[str, str]
    decoupled: bool
    batched: bool

    @property
    def text(self) -> bool:
        """Whether prompts and answers are texts."""
        return "text_input" in self.inputs

    def first(self, *names: str) -> str | None:
        """The first of these inputs that the model has."""
        return next((name for name in names if name in self.inputs), None)


class Server:
    """A connection to one model. All methods belong to one event loop.

    Args:
        url: host:port of the server's gRPC.
        model: its name there.
        version: its version there, or "".
        timeout: seconds the server may take for the next response.
    """

    def __init__(self, url: str, model: str, *, version: str = "", ssl: bool = False, timeout: float = 600.0) -> None:
        self.url = url
        self.model = model
        self._version = version
        self._ssl = ssl
        self._timeout = timeout
        self._client: Any = None
        self._interface: Interface | None = None

    async def interface(self) -> Interface:
        """What the model takes, asked once per connection.

        Raises:
            Unavailable: the server or the model is not ready.
            ModelError: it has no such model, or one with other tensors.
        """
        if self._interface is None:
            self._interface = await self._ask()
        return self._interface

    async def infer(self, inputs: Arrays, request_id: str) -> AsyncGenerator[Arrays, None]:
        """The responses to one request; closing the generator cancels it on the server.

        Raises:
            TroupeError: the server is gone, or refuses the request.
        """
        interface = await self.interface()
        tensors = [self._tensor(name, array, interface) for name, array in inputs.items()]
        try:
            if not interface.decoupled:
                call = self._connection().infer(self.model, tensors, self._version, request_id=request_id)
                yield _arrays(await asyncio.wait_for(call, self._timeout))
                return
            async for result in self._stream(tensors, request_id):
                yield result
        except (InferenceServerException, grpc.RpcError, TimeoutError) as error:
            raise self._failure(error) from error

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            with suppress(Exception):
                await self._client.close()

    async def _stream(self, tensors: list[Any], request_id: str) -> AsyncGenerator[Arrays, None]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": self.model,
                "model_version": self._version,
                "inputs": tensors,
                "request_id": request_id,
            }

        # The one request ends our side of the stream, so the server ends it after the last response.
        responses = self._connection().stream_infer(requests())
        try:
            while True:
                try:
                    result, error = await asyncio.wait_for(anext(responses), self._timeout)
                except StopAsyncIteration:
                    return
                if error is not None:
                    raise error
                yield _arrays(result)
        finally:
            responses.cancel()

    def _connection(self) -> Any:
        if self._client is None:
            options = [
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ]
            self._client = aio.InferenceServerClient(self.url, ssl=self._ssl, channel_args=options)
        return self._client

    async def _ask(self) -> Interface:
        client = self._connection()
        try:
            metadata = await client.get_model_metadata(self.model, self._version, client_timeout=_ASK_S)
            config = (await client.get_model_config(self.model, self._version, client_timeout=_ASK_S)).config
        except (InferenceServerException, grpc.RpcError) as error:
            raise self._failure(error) from error
        interface = Interface(
            inputs={each.name: each.datatype for each in metadata.inputs},
            decoupled=config.model_transaction_policy.decoupled,
            batched=config.max_batch_size > 0,
        )
        if not interface.text and "input_ids" not in interface.inputs:
            raise ModelError(
                f"Model {self.model!r} on {self.url} takes neither input_ids nor text_input but "
                f"{', '.join(interface.inputs)}; name a TensorRT-LLM model (tensorrt_llm or ensemble)."
            )
        return interface

    def _tensor(self, name: str, array: npt.NDArray[Any], interface: Interface) -> Any:
        datatype = interface.inputs[name]
        array = np.asarray(array, dtype=np.object_ if datatype == "BYTES" else triton_to_np_dtype(datatype))
        array = array[None] if interface.batched else array
        tensor = aio.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        return tensor

    def _failure(self, error: Exception) -> TroupeError:
        """What a failure of the server means to the client."""
        status, message = _status_of(error)
        if isinstance(error, TimeoutError):
            return Unavailable(f"The Triton server at {self.url} has sent nothing for {self._timeout:g} s; try again.")
        if status in _GONE or any(word in message for word in _NOT_READY):
            self._interface = None
            return Unavailable(f"The Triton server at {self.url} cannot be reached or is not ready: {message}")
        if found := _TOO_LONG.search(message):
            return ContextOverflow(int(found[2]), int(found[1]), param="prompt")
        if "maximum queue size" in message:
            return Overloaded(f"The queue of the Triton server at {self.url} is full: {message}", retry_after=1.0)
        return ModelError(f"The Triton server at {self.url} refuses the request: {message}")


def _status_of(error: Exception) -> tuple[str, str]:
    """The name of the gRPC status, "" if there is none, and the message."""
    if isinstance(error, InferenceServerException):
        return str(error.status() or "").removeprefix("StatusCode."), str(error.message())
    if isinstance(error, grpc.RpcError):
        return error.code().name, str(error.details())
    return "", last_line(error)


def _arrays(result: Any) -> dict[str, npt.NDArray[Any]]:
    """The output tensors of a response; those without data are left out."""
    response = result.get_response()
    raw = response.raw_output_contents
    names = [each.name for i, each in enumerate(response.outputs) if i < len(raw) and len(raw[i])]
    return {name: result.as_numpy(name) for name in names}
