"""A model's chat template: selecting the one of a request, and rendering a conversation with it."""

from __future__ import annotations

import bisect
import contextlib
import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from deployments.core.calls import ChatPrompt
from deployments.core.errors import (
    RAISED_BY_HOOKS,
    BrokenHook,
    ModelError,
    TemplateFailed,
    TroupeError,
    UnsupportedParameter,
    hook_failure,
    last_line,
)
from model_loaders.contract import Hook, ModelInfo
from model_loaders.prompts.merging import merged
from model_loaders.prompts.message_forms import Message, MessageForms
from model_loaders.prompts.template_coverage import (
    SAMPLE_TOOL,
    TOOL,
    Piece,
    begins_with_system,
    is_said,
    pattern_of,
    unseen_piece,
    unseen_words,
)
from model_loaders.prompts.text import accepted, as_text
from model_loaders.prompts.written_tools import with_written_tools

_USER: Message = {"role": "user", "content": "Go on."}
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_VIEWS, _REMEMBERED = 32, 1024
# transformers' own methods, by name: the process that renders templates of requests does not import them.
_STOCK = ("PreTrainedTokenizerBase.apply_chat_template", "ProcessorMixin.apply_chat_template")
# Arguments of apply_chat_template that are not variables of the template.
NO_VARIABLES = ("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs")


class ChatTemplate:
    """Renders messages to a prompt text, for one loaded model."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self._own = info.apply_chat_template is None
        self._function = info.apply_chat_template or _default(info) or (_plain_chat if info.plain_chat else None)
        self._views: dict[Hashable, _View] = {}

    def render(self, chat: ChatPrompt) -> str:
        """The prompt text of a conversation.

        Raises:
            TemplateFailed: there is no template, it refuses these messages, or it leaves one of them out.
            UnsupportedParameter: it has no place for tools, or for parts of some type.
        """
        if self._function is None:
            raise TemplateFailed(
                f"Model {self.info.label!r} has no chat template. Give its loader an apply_chat_template hook or "
                "a chat_template string, set plain_chat, or use /v1/completions."
            )
        view = self._view(chat)
        if chat.tools and chat.write_tools and not self._has_place(chat, view):
            return self.render(with_written_tools(chat))
        if chat.tools:
            self._check_tools(chat, view)
        messages = view.forms.shape(chat.messages)
        try:
            return self._whole(chat, view, messages)
        except TemplateFailed:
            unchanged = view.forms.shape(chat.messages, own_roles=True)
            if not self._own or unchanged == messages:
                raise
            with contextlib.suppress(TemplateFailed):
                return self._whole(chat, view, unchanged)
            raise

    def _whole(self, chat: ChatPrompt, view: _View, messages: list[Message]) -> str:
        """The prompt text of messages in the template's form; all of them are in it."""
        if self._own:
            self._check_parts(messages, view.forms)
        pattern = (pattern_of(messages), chat.merge_roles, chat.add_generation_prompt)
        known = pattern in view.proven
        if not known:
            self._check_reach(chat, view, messages, pattern)
        try:
            text = self._write(chat, self._joined(chat, messages))
        except TroupeError:
            raise
        except RAISED_BY_HOOKS as error:
            raise self._failure(chat, view, messages, error) from error
        text = as_text(text, "apply_chat_template", " (pass tokenize=False on)")
        if not self._own and not text.strip():
            raise BrokenHook("Hook apply_chat_template returned an empty text; expected the prompt of the messages.")
        if self._own and not is_said(messages, text):
            if known:
                self._check_reach(chat, view, messages, pattern)
            shows_system = view.forms.reaches(str(messages[0]["role"]))
            trial = partial(self._tried, chat)
            self._refuse(unseen_words(messages, trial, shows_system=shows_system, prompt=text))
        return text

    def source(self, given: str | None = None, *, tools: bool = False) -> str | None:
        """The text of the template that a request uses; None if a function of the loader writes the prompts.

        Args:
            given: the request's own template, or the name of one of the model's.
            tools: the request has tools.
        """
        if not self._own:
            return None
        given = given or self._given
        named = self.named
        if given is None:
            given = ("tool_use" if tools and "tool_use" in named else "default") if named else self._owned
        return named.get(given, None if given == "default" else given) if given is not None else None

    def is_foreign(self, given: str | None) -> bool:
        """Whether a request's `chat_template` is a template of its own, not the name of one of the model's."""
        return bool(given) and given != "default" and given not in self.named

    @property
    def named(self) -> dict[str, str]:
        """The model's templates by name; {} if it has one without a name."""
        owned = self._owned
        if isinstance(owned, Mapping):
            return dict(owned)
        if isinstance(owned, list | tuple):
            return {each["name"]: each["template"] for each in owned}
        return {}

    @property
    def choices(self) -> dict[str, str] | None:
        """The templates among which a request's tools choose; None if there is no choice."""
        return None if self._given else self.named or None

    def describe(self) -> dict[str, Any] | None:
        """What the template was found to read, as JSON values; None if there is none, or a function in its place."""
        return None if self._function is None or not self._own else self._view(ChatPrompt(messages=())).forms.describe()

    @property
    def _given(self) -> str | None:
        """The loader's template in place of the tokenizer's, or the name of one of the tokenizer's."""
        return self.info.chat_template or self.info.apply_chat_template_kwargs.get("chat_template")

    @property
    def _owned(self) -> Any:
        """The chat template of the tokenizer or processor whose method writes the prompts."""
        return getattr(getattr(self._function, "__self__", None), "chat_template", None) if self._own else None

    def _view(self, chat: ChatPrompt) -> _View:
        """What is known of the template for requests like this one."""
        source = self.source(chat.chat_template, tools=bool(chat.tools))
        switches = frozenset((k, v if isinstance(v, bool | None) else "") for k, v in chat.template_kwargs.items())
        key = (source, bool(chat.tools), switches)
        if key not in self._views:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            sample = _sample(chat)
            self._views[key] = _View(MessageForms(lambda messages: self._write(sample, messages), source))
        return self._views[key]

    def _write(self, chat: ChatPrompt, messages: Sequence[Message]) -> Any:
        assert self._function is not None
        kwargs: dict[str, Any] = {"tokenize": False, **self.info.apply_chat_template_kwargs}
        kwargs["add_generation_prompt"] = chat.add_generation_prompt and kwargs.get("add_generation_prompt", True)
        if chat.continue_final_message:
            kwargs["continue_final_message"] = True
        if chat.tools:
            kwargs["tools"] = [dict(tool) for tool in chat.tools]
        if self._own and (source := self._passed(chat)) is not None:
            kwargs["chat_template"] = source
        kwargs.update(chat.template_kwargs)
        # A function of the loader may change what it is given.
        written = [dict(message) if self._own else copy.deepcopy(message) for message in messages]
        if self._is_stock and any(m.get("content", "") is None for m in written):
            return self._with_nulls(written, kwargs)
        return self._function(written, **accepted(self._function, kwargs))

    def _passed(self, chat: ChatPrompt) -> str | None:
        """The template to name to the function; None if its own is meant."""
        if chat.chat_template is None and self._given is None and not self.named:
            return None
        return self.source(chat.chat_template, tools=bool(chat.tools))

    @property
    def _is_stock(self) -> bool:
        """Whether the function is transformers' own method, which drops what is null."""
        function = getattr(self._function, "__func__", None)
        return self._own and getattr(function, "__qualname__", "") in _STOCK

    def _with_nulls(self, messages: list[Message], kwargs: dict[str, Any]) -> str:
        """As transformers' method writes messages, but a content of null stays null."""
        variables = {key: value for key, value in kwargs.items() if key not in NO_VARIABLES}
        source = variables.pop("chat_template", None) or self.source(tools="tools" in kwargs)
        owner = getattr(self._function, "__self__", None)
        tokenizer = getattr(owner, "tokenizer", owner)
        variables = {**getattr(tokenizer, "special_tokens_map", {}), **variables}
        rendered, _ = render_jinja_template([messages], chat_template=source, **variables)
        return str(rendered[0])

    def _joined(self, chat: ChatPrompt, messages: list[Message]) -> list[Message]:
        return merged(messages) if chat.merge_roles else messages

    def _has_place(self, chat: ChatPrompt, view: _View) -> bool:
        """Whether the template writes tools in a conversation that begins like this one."""
        system = begins_with_system(chat.messages)
        if system not in view.shows_tools:
            view.shows_tools[system] = self._shows_tools(chat, view, system)
        return view.shows_tools[system]

    def _check_tools(self, chat: ChatPrompt, view: _View) -> None:
        system = begins_with_system(chat.messages)
        if not self._has_place(chat, view):
            other = self._shows_tools(chat, view, not system)
            where = "" if not other else " in a conversation that begins with a system message"
            if other and not system:
                where = " in a conversation that does not begin with a system message"
            raise UnsupportedParameter(
                f"The chat template of model {self.info.label!r} has no place for tools{where}. Give its loader a "
                "chat_template that has, set api.tools_without_template, or leave tools out.",
                param="tools",
            )

    def _shows_tools(self, chat: ChatPrompt, view: _View, system: bool) -> bool:
        """Whether a tool's name reaches the prompt; if the template refuses the sample, whether it speaks of tools.

        Args:
            system: a system message stands first.
        """
        try:
            text = self._write(_sample(chat), view.forms.shape([_SYSTEM, _USER] if system else [_USER]))
        except RAISED_BY_HOOKS:
            return "tools" in (self.source(chat.chat_template, tools=True) or "tools")
        return isinstance(text, str) and TOOL in text.lower()

    def _check_parts(self, messages: Sequence[Message], forms: MessageForms) -> None:
        """Refuse parts that the template has no place for."""
        for index, message in enumerate(messages):
            content = message.get("content")
            if not isinstance(content, list):
                continue
            for i, part in enumerate(content):
                place = f"messages[{index}].content[{i}]"
                if not forms.writes(message["role"], part):
                    raise UnsupportedParameter(
                        f"Invalid '{place}': model {self.info.label!r} reads no parts of type {part['type']!r}.",
                        param=place,
                    )
            media = any(part["type"] != "text" for part in content)
            if media and forms.reads(message["role"]) == "text":
                raise TemplateFailed(
                    f"The chat template of model {self.info.label!r} writes texts only in messages of role "
                    f"{message['role']!r}, so it has no place for an image or a recording. Give its loader an "
                    "apply_chat_template hook or a chat_template that writes one.",
                    param=f"messages[{index}].content",
                )

    def _check_reach(self, chat: ChatPrompt, view: _View, messages: list[Message], pattern: Hashable) -> None:
        """Refuse a conversation of which a piece would not reach the prompt."""
        if not messages:
            return
        shows_system = self._own and view.forms.reaches(str(messages[0]["role"]))
        self._refuse(unseen_piece(messages, partial(self._tried, chat), strict=self._own, shows_system=shows_system))
        if len(view.proven) >= _REMEMBERED:
            view.proven.clear()
        view.proven.add(pattern)

    def _refuse(self, piece: Piece | None) -> None:
        if piece is not None:
            raise TemplateFailed(
                f"The chat template of model {self.info.label!r} does not write {piece.what}, so the model would "
                "not see it. Leave it out of the request, or give the model's loader a chat_template that writes it.",
                param=piece.place,
            )

    def _tried(self, chat: ChatPrompt, messages: list[Message]) -> str | None:
        """The text of messages of a trial; None if there is none."""
        try:
            text = self._write(replace(chat, continue_final_message=False), self._joined(chat, messages))
        except RAISED_BY_HOOKS:
            return None
        return text if isinstance(text, str) else None

    def _failure(self, chat: ChatPrompt, view: _View, messages: list[Message], error: BaseException) -> TroupeError:
        """The error for a conversation that the template, or the function in its place, does not write."""
        name, reason = self.info.label, last_line(error)
        if not self._own:
            if not isinstance(error, TemplateError | ValueError):
                return ModelError(hook_failure("apply_chat_template", error, self.info.apply_chat_template))
            place = self._refused(chat, messages, reason)
            refusal = f"Hook apply_chat_template of model {name!r} refuses {place or 'these messages'}: {reason}"
            return TemplateFailed(refusal, param=place or "messages")
        short = [view.forms.shape(messages) for messages in ([_USER], [_SYSTEM, _USER])]
        if all(self._tried(chat, messages) is None for messages in short):
            with_tools = None if chat.tools else replace(chat, tools=[SAMPLE_TOOL])
            if with_tools and any(self._tried(with_tools, messages) is not None for messages in short):
                return TemplateFailed(
                    f"The chat template of model {name!r} cannot write a conversation without tools: {reason}. "
                    "Send tools, or give its loader another chat_template.",
                    param="tools",
                )
            return TemplateFailed(
                f"The chat template of model {name!r} fails on any conversation: {reason}", param="messages"
            )
        place = self._refused(chat, messages, reason)
        return TemplateFailed(
            f"The chat template of model {name!r} refuses {place or 'these messages'}: {reason}",
            param=place or "messages",
        )

    def _refused(self, chat: ChatPrompt, messages: list[Message], reason: str) -> str | None:
        """The message with which the template's refusal begins; None if no one message brings it about."""
        chat = replace(chat, continue_final_message=False)

        def refuses(count: int) -> bool:
            try:
                self._write(chat, self._joined(chat, messages[:count]))
            except RAISED_BY_HOOKS as other:
                return last_line(other) == reason
            return False

        if not refuses(len(messages)):
            return None
        first = bisect.bisect_left(range(1, len(messages)), True, key=refuses)
        return f"messages[{first}]"


@dataclass(slots=True)
class _View:
    """What is known of a template for one kind of request.

    Attributes:
        shows_tools: whether tools reach the prompt, with a system message first and without one, as far as known.
        proven: patterns of conversations of which every piece reaches the prompt.
    """

    forms: MessageForms
    shows_tools: dict[bool, bool] = field(default_factory=dict)
    proven: set[Hashable] = field(default_factory=set)


def _sample(chat: ChatPrompt) -> ChatPrompt:
    """A request like this one, for trials."""
    return replace(
        chat,
        messages=(),
        tools=[SAMPLE_TOOL] if chat.tools else None,
        add_generation_prompt=False,
        continue_final_message=False,
    )


def _default(info: ModelInfo) -> Hook | None:
    for owner in (info.processor, info.tokenizer):
        method = getattr(owner, "apply_chat_template", None)
        if method is not None and (info.chat_template or getattr(owner, "chat_template", None)):
            return method  # type: ignore[no-any-return]
    return None


def _plain_chat(
    messages: Sequence[Message], add_generation_prompt: bool = True, continue_final_message: bool = False
) -> str:
    """A conversation as `Role: text` lines."""
    lines = [f"{str(m.get('role', 'user')).capitalize()}: {_text_of(m.get('content'))}" for m in messages]
    if add_generation_prompt and not continue_final_message:
        lines.append("Assistant:")
    return "\n".join(lines)


def _text_of(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content if isinstance(part, Mapping) and "text" in part)
