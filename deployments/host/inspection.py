"""A loader's `done_callback`: what a model was given and what it made of it, shown when each choice has ended.

    def done_callback(prompt, input, output, response, **rest):
        print(repr(prompt), output.tolist(), response)

Called in a thread of its own with the keyword arguments below; a function gets those it names, or all of them where it
takes `**kwargs`. The answer waits for it, so that a debugger can stop there. What it raises is logged, and changes no
answer.

    uid             the request's id, and "#" and the choice's number
    request         the call: `messages.GenerateCall`
    prompt          the prompt as the chat template wrote it; None for a prompt of token ids
    input           what the model was given: `input_ids` LongTensor[1, length], pixel values and the like
    output          LongTensor[new], the generated token ids
    response        their text, as the client gets it
    finish_reason   "stop", "length" or "tool_calls"
    capture         the states that `inspect` of the loader names, as tensors by name; empty without it
    model_info      the model's `ModelInfo`
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from deployments.core.calls import GenerateCall
from deployments.core.errors import RAISED_BY_HOOKS
from deployments.core.events import Delta, Event
from model_loaders.prompts.text import accepted

if TYPE_CHECKING:
    from deployments.host.loaded_model import EncodedPrompt
    from model_loaders.contract import ModelInfo

logger = logging.getLogger("troupe.host")


class Inspection:
    """Gathers the choices of a call for the model's `done_callback`.

    Args:
        prompts: the prompts of the call, encoded.

    Attributes:
        captured: the states of each choice for the callback.
    """

    def __init__(self, info: ModelInfo, call: GenerateCall, prompts: list[EncodedPrompt]) -> None:
        self._info = info
        self._call = call
        self._prompts = prompts
        self.captured: Mapping[int, Mapping[str, torch.Tensor]] = {}
        self._texts: dict[int, str] = {}
        self._token_ids: dict[int, list[int]] = {}

    def ended(self, event: Event) -> Callable[[], None] | None:
        """Take note of an event; where it ends a choice, the callback's call."""
        if not isinstance(event, Delta):
            return None
        self._texts[event.choice] = self._texts.get(event.choice, "") + event.text
        self._token_ids.setdefault(event.choice, []).extend(event.token_ids)
        return (lambda: self._call_back(event)) if event.finish_reason is not None else None

    def _call_back(self, last: Delta) -> None:
        callback = self._info.done_callback
        assert callback is not None
        prompt = self._prompts[last.choice // self._call.n]
        seen: dict[str, Any] = {
            "uid": f"{self._call.request_id}#{last.choice}",
            "request": self._call,
            "prompt": prompt.text,
            "input": {"input_ids": torch.tensor([prompt.encoded.input_ids]), **prompt.encoded.model_inputs},
            "output": torch.tensor(self._token_ids[last.choice], dtype=torch.long),
            "response": self._texts[last.choice],
            "finish_reason": last.finish_reason,
            "capture": dict(self.captured.get(last.choice, {})),
            "model_info": self._info,
        }
        try:
            callback(**accepted(callback, seen))
        except RAISED_BY_HOOKS:
            logger.exception("done_callback of model %s failed on %s", self._info.label, seen["uid"])
