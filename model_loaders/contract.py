"""The loader contract: what a loader function returns.

A loader is a function `load_model(device="cuda:0", **kwargs)` (or a module-level `model_info`) that returns a
`ModelInfo`, or a dict of the same keys. Required: `model`, and `tokenizer` or `processor` (or the Hub id or folder of
one as `model_name`). Everything else has a default that does what the model's own `generate` would.

    def load_model(device: str, path: str):
        model = AutoModelForCausalLM.from_pretrained(path).to(device)
        return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(path)}

The hooks, each with keyword arguments of its own (`<hook>_kwargs`) that are passed at every call:

    apply_chat_template(messages: list[dict], **kwargs) -> str
    encode(prompt: str, **kwargs) -> mapping with input_ids     (images=[...] only when the request has images)
    generate(**inputs, max_new_tokens=..., temperature=..., ...) -> LongTensor[1, prompt + new]
    decode(token_ids: LongTensor[new], **kwargs) -> str
    embed(texts: list[str]) -> FloatTensor[len(texts), dim]
    done_callback(uid=..., prompt=..., input=..., output=..., response=..., ...) -> None

A hook given here always replaces the method of the tokenizer or processor.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

from deployments.core.errors import ModelLoadFailed, last_line

if TYPE_CHECKING:
    from model_loaders.sentence_format import SentenceFormat

Hook: TypeAlias = Callable[..., Any]


@dataclass(kw_only=True)
class ModelInfo:
    """A loaded model and what is needed to use it.

    Attributes:
        model: the module, on its device, in eval mode (put there if it is not).
        model_name: for logs; the configured id is what clients see. Names the tokenizer where none is given.
        tokenizer: a transformers tokenizer, or anything with its `encode`, `decode` and `eos_token_id`.
        processor: a transformers processor (its `.tokenizer` is used when `tokenizer` is not given).
        apply_chat_template, encode, generate, decode, embed: the hooks, see the module's docstring.
        chat_template: a Jinja chat template that replaces the tokenizer's.
        response_template: describes the model's answers as that of a transformers tokenizer does, which it replaces.
        apply_chat_template_kwargs, encode_kwargs, generate_kwargs, decode_kwargs: passed at every call of the hook or
            of its default.
        plain_chat: answer chats without a template as `Role: text` lines; off, they are refused.
        max_model_len: positions, prompt and text together; None reads the model's config.
        stop_token_ids: terminators besides those of tokenizer, template and generation_config.
        logits_processors: transformers `LogitsProcessor`s applied to every row.
        done_callback: shown every choice that has ended, for inspection; see `deployments.host.inspection`.
        close: called once when the model is unloaded.
        engine: builds another engine than ours: `engine(info, options) -> Engine`; `model` may be None then.
        sentence_format: how vectors are made of texts; None reads it from the model's folder, if that is a
            sentence-transformers model.
        hooks: functions that requests may name in interventions: `hook(states, *, module, positions, args)`, see
            docs/inside.md.
        vectors: vectors that requests may name in interventions: tensors, or paths of safetensors files.
        inspect: what `done_callback` is shown of the model's states: `{"modules": [...], "positions": "prompt"}`.
        served_as: the id that clients know it by; set when it is loaded for the configuration.
    """

    model: Any = None
    model_name: str = ""
    tokenizer: Any = None
    processor: Any = None
    apply_chat_template: Hook | None = None
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    encode: Hook | None = None
    encode_kwargs: dict[str, Any] = field(default_factory=dict)
    generate: Hook | None = None
    generate_kwargs: dict[str, Any] = field(default_factory=dict)
    decode: Hook | None = None
    decode_kwargs: dict[str, Any] = field(default_factory=dict)
    embed: Hook | None = None
    chat_template: str | None = None
    response_template: Mapping[str, Any] | None = None
    plain_chat: bool = False
    max_model_len: int | None = None
    stop_token_ids: Sequence[int] = ()
    logits_processors: Sequence[Any] = ()
    done_callback: Hook | None = None
    close: Callable[[], None] | None = None
    engine: Callable[..., Any] | None = None
    sentence_format: SentenceFormat | None = None
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    vectors: Mapping[str, Any] = field(default_factory=dict)
    inspect: Mapping[str, Any] = field(default_factory=dict)
    served_as: str = field(default="", init=False)

    @property
    def label(self) -> str:
        """The model's name in messages: its id in the configuration, if it has one."""
        return self.served_as or self.model_name

    @property
    def described_answers(self) -> Mapping[str, Any] | None:
        """The `response_template` that is used; None if there is none."""
        return self.response_template or getattr(self.tokenizer, "response_template", None)

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.processor is not None:
            self.tokenizer = getattr(self.processor, "tokenizer", None)


_HOOKS = ("apply_chat_template", "encode", "generate", "decode", "embed", "done_callback", "close", "engine")
_KWARGS = ("apply_chat_template_kwargs", "encode_kwargs", "generate_kwargs", "decode_kwargs")


def as_model_info(returned: object, loader: str) -> ModelInfo:
    """Check the return value of a loader.

    Args:
        returned: a `ModelInfo`, or a mapping of its fields.
        loader: the loader's name as configured, for the messages.

    Raises:
        ModelLoadFailed: it is neither, or a field is unknown, missing or of the wrong kind.
    """
    if isinstance(returned, Mapping):
        known = [f.name for f in fields(ModelInfo) if f.init]
        for key in returned:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                meant = f" (did you mean {close[0]!r}?)." if close else f"; known keys: {', '.join(known)}."
                raise ModelLoadFailed(f"Loader {loader} returned a dict with the unknown key {key!r}{meant}")
        returned = ModelInfo(**returned)
    if not isinstance(returned, ModelInfo):
        raise ModelLoadFailed(
            f"Loader {loader} returned {_kind(returned)}; expected a ModelInfo or a dict with its fields."
        )
    _check(returned, loader)
    if returned.engine is None and _has_no_text_side(returned):
        _add_text_side(returned, loader)
    return returned


def _has_no_text_side(info: ModelInfo) -> bool:
    return info.tokenizer is None and info.processor is None and (info.encode is None or info.decode is None)


def _add_text_side(info: ModelInfo, loader: str) -> None:
    """The processor or tokenizer that `model_name` names."""
    from model_loaders.text_side import load_text_side

    try:
        info.processor, info.tokenizer = load_text_side(info.model_name)
    except Exception as error:
        raise ModelLoadFailed(
            f"Loader {loader} returned neither tokenizer nor processor, and {info.model_name!r} names none: "
            f"{last_line(error)}"
        ) from error


def _check(info: ModelInfo, loader: str) -> None:
    if info.engine is None:
        if not callable(info.model):
            raise ModelLoadFailed(f"Loader {loader} returned model={_kind(info.model)}; expected a torch module.")
        if _has_no_text_side(info) and not info.model_name:
            raise ModelLoadFailed(
                f"Loader {loader} returned neither tokenizer nor processor; give one, or encode and decode hooks, or a "
                "model_name that has a tokenizer."
            )
    for name, (is_right, expected) in _KINDS.items():
        value = getattr(info, name)
        if (value is not None or name in _KWARGS) and not is_right(value):
            raise ModelLoadFailed(f"Loader {loader} returned {name}={_kind(value)}; expected {expected}.")
    for name, hook in info.hooks.items():
        if not callable(hook):
            raise ModelLoadFailed(f"Loader {loader} returned hooks[{name!r}]={_kind(hook)}; expected a function.")


def _is_text_side(value: object) -> bool:
    """Whether it can be a tokenizer or a processor: with hooks of the loader, it needs none of their methods."""
    return not isinstance(value, str | bytes | PathLike | int | float | Mapping | Sequence | type)


def _are_ids(value: Any) -> bool:
    try:
        return all(operator.index(each) >= 0 for each in value)
    except TypeError:
        return False


def _are_functions(value: Any) -> bool:
    return isinstance(value, Iterable) and all(map(callable, value))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer": (_is_text_side, "a tokenizer, such as AutoTokenizer.from_pretrained(…)"),
    "processor": (_is_text_side, "a processor, such as AutoProcessor.from_pretrained(…)"),
    **dict.fromkeys(_HOOKS, (callable, "a function")),
    **dict.fromkeys(_KWARGS, (lambda value: isinstance(value, dict), "a dict")),
    **dict.fromkeys(
        ("hooks", "vectors", "inspect", "response_template"), (lambda value: isinstance(value, Mapping), "a dict")
    ),
    "chat_template": (lambda value: isinstance(value, str | dict), "a Jinja template"),
    "max_model_len": (lambda value: isinstance(value, int) and value > 0, "a positive number of tokens"),
    "stop_token_ids": (_are_ids, "a list of token ids"),
    "logits_processors": (_are_functions, "a list of LogitsProcessors"),
}
"""What a field of a `ModelInfo` can be, and how a message says it."""


def _kind(value: object) -> str:
    """A value's type, and the value itself if it is short."""
    shown = repr(value)
    return f"{type(value).__name__}" + (f" ({shown})" if len(shown) <= 40 else "")
