"""The embedding settings of a sentence-transformers folder (https://sbert.net): `modules.json` and the files it names.

The first module is the transformer; those after it make a vector of its last hidden states. Every setting is read. A
setting that cannot be honored is an error that names it, because vectors with another pooling rank wrongly.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import normalizers
from torch import Tensor

from deployments.core.errors import ModelLoadFailed
from model_loaders.weights.adapter_folder import folder_file

_MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
# Of the transformer module; the name depended on the model in old versions.
_TRANSFORMER = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
# The two ways sentence-transformers names each pooling, and ours, in the order of concatenation.
_POOLINGS = (
    ("pooling_mode_cls_token", "cls", "cls"),
    ("pooling_mode_max_tokens", "max", "max"),
    ("pooling_mode_mean_tokens", "mean", "mean"),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", "mean_sqrt_len"),
    ("pooling_mode_weightedmean_tokens", "weightedmean", "weighted_mean"),
    ("pooling_mode_lasttoken", "lasttoken", "last"),
)
_FIX = "Give the loader an embed hook that computes it"


@dataclass(frozen=True, slots=True)
class Normalize:
    """The step that brings vectors to length 1."""

    def __call__(self, vectors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(vectors, dim=-1)


@dataclass(frozen=True, slots=True)
class Shorten:
    """The step that keeps the first dimensions of vectors."""

    dimensions: int

    def __call__(self, vectors: Tensor) -> Tensor:
        return vectors[:, : self.dimensions]


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceFormat:
    """How the vector of a text is computed.

    Attributes:
        poolings: names of poolings (`deployments.host.embedding.pooling`), whose vectors are joined in this order.
        include_prompt: the prompt's tokens are pooled with the text's.
        steps: applied in order to the pooled vectors, float32 [batch, dimensions].
        prompts: texts that are put before a text, by name.
        default_prompt: the name of the one that is used if a request names none.
        max_seq_length: tokens of a text, if the folder limits them.
        lowercases: texts are lowercased before they are encoded.
        folder: the transformer's own folder within the model's, usually "".
    """

    poolings: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    steps: Sequence[Callable[[Tensor], Tensor]] = ()
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_seq_length: int | None = None
    lowercases: bool = False
    folder: str = ""

    def weights_of(self, name: str) -> str:
        """The Hub id or folder that has the transformer of a model.

        Raises:
            ModelLoadFailed: it is a folder within a repository of the Hub.
        """
        if self.folder in ("", "."):
            return name
        if not Path(name).is_dir():
            raise ModelLoadFailed(
                f"The transformer of {name} lies in its folder {self.folder!r}: download it and name the local folder."
            )
        return str(Path(name) / self.folder)


def read_sentence_format(name: str, revision: str | None = None) -> SentenceFormat | None:
    """The embedding settings of a Hub id or folder; None if it is not a sentence-transformers model.

    Raises:
        ModelLoadFailed: a module or setting is not among those that can be honored; it is named.
    """
    file = folder_file(name, _MODULES, revision)
    if file is None:
        return None
    return _Reader(name, revision).format(json.loads(file.read_text(encoding="utf-8")))


def format_of(info: Any) -> SentenceFormat | None:
    """The embedding settings of a loaded model; None if neither its loader nor its folder has any.

    Args:
        info: a `ModelInfo`. If the loader left it open, the folder or Hub id that the model was loaded from is read.
    """
    if info.embed is not None or info.engine is not None:
        return None
    name = getattr(info.model, "name_or_path", None)
    if info.sentence_format is not None or not isinstance(name, str) or not name:
        found: SentenceFormat | None = info.sentence_format
        return found
    headless = not hasattr(info.model, "generate")
    return read_sentence_format(name) if headless or Path(name).is_dir() else None


def lowercase(tokenizer: Any) -> None:
    """Let a tokenizer lowercase what it reads, its special tokens excepted.

    Raises:
        ModelLoadFailed: it is not one of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelLoadFailed(f"{type(tokenizer).__name__} cannot lowercase texts, as do_lower_case asks for.")
    own = backend.normalizer
    if own is None or own.normalize_str("A") != "a":
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if own is None else [own])])


class _Reader:
    def __init__(self, name: str, revision: str | None) -> None:
        self.name = name
        self.revision = revision

    def format(self, modules: Sequence[Mapping[str, Any]]) -> SentenceFormat:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if kinds[:1] != ["Transformer"]:
            raise self._refused(f"begins with the module {modules[0]['type'] if modules else None!r}")
        poolings: tuple[str, ...] | None = None
        include_prompt, steps = True, []
        for kind, module in zip(kinds[1:], modules[1:], strict=True):
            config = self._json(f"{module['path']}/config.json")
            if kind == "Pooling" and poolings is None:
                poolings, include_prompt = self._poolings(config), bool(config.get("include_prompt", True))
            elif kind in ("Dense", "Normalize", "LayerNorm", "Dropout") and poolings is not None:
                steps.extend(self._step(kind, module["path"], config))
            else:
                raise self._refused(f"has the module {module['type']!r} after {poolings or 'the transformer'}")
        if poolings is None:
            raise self._refused("has no Pooling module")
        transformer, named = self._transformer(modules[0]["path"]), self._json(_PROMPTS)
        if named.get("truncate_dim") is not None:
            steps.append(Shorten(named["truncate_dim"]))
        return SentenceFormat(
            poolings=poolings,
            include_prompt=include_prompt,
            steps=steps,
            prompts=named.get("prompts") or {},
            default_prompt=named.get("default_prompt_name"),
            max_seq_length=transformer.get("max_seq_length"),
            lowercases=bool(transformer.get("do_lower_case", False)),
            folder=modules[0]["path"],
        )

    def _transformer(self, folder: str) -> Mapping[str, Any]:
        found = (self._json(f"{folder}/{name}".lstrip("/")) for name in _TRANSFORMER)
        config = next((each for each in found if each), {})
        task = config.get("transformer_task", "feature-extraction")
        output = (config.get("modality_config") or {}).get("text", {}).get("method_output_name", "last_hidden_state")
        if task != "feature-extraction" or output != "last_hidden_state" or config.get("query_expansion"):
            raise self._refused(f"has a transformer of the task {task!r} with the output {output!r}")
        return config

    def _poolings(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        known = {theirs: ours for _, theirs, ours in _POOLINGS}
        given = config.get("pooling_mode")
        if given is None:
            flags = {key for key, value in config.items() if key.startswith("pooling_mode_") and value}
            unknown = flags - {flag for flag, _, _ in _POOLINGS}
            if unknown:
                raise self._refused(f"has the pooling {min(unknown)!r}")
            return tuple(ours for flag, _, ours in _POOLINGS if flag in flags) or ("mean",)
        names = [given] if isinstance(given, str) else list(given)
        unknown = set(names) - known.keys()
        if unknown:
            raise self._refused(f"has the pooling {min(unknown)!r}")
        return tuple(known[name] for name in names)

    def _step(self, kind: str, folder: str, config: Mapping[str, Any]) -> list[Callable[[Tensor], Tensor]]:
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, "sentence_embedding"):
                raise self._refused(f"has the module {folder!r} with {key}={config[key]!r}")
        if kind == "Dropout":
            return []
        if kind == "Normalize":
            return [Normalize()]
        if kind == "LayerNorm":
            norm = torch.nn.LayerNorm(config["dimension"])
            return [self._loaded(norm, folder, "norm.")]
        if config.get("use_residual"):
            raise self._refused(f"has the module {folder!r} with use_residual=True")
        linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
        return [self._loaded(linear, folder, "linear."), self._activation(folder, config)]

    def _activation(self, folder: str, config: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        name = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None) if module.startswith("torch.nn.") else None
        if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
            raise self._refused(f"has the module {folder!r} with the activation {name!r}")
        activation: Callable[[Tensor], Tensor] = found()
        return activation

    def _loaded(self, module: torch.nn.Module, folder: str, prefix: str) -> torch.nn.Module:
        """A module with the weights of its folder, every one of them."""
        tensors = {key.removeprefix(prefix): value.float() for key, value in self._weights(folder).items()}
        try:
            module.load_state_dict(tensors)
        except RuntimeError as error:
            raise ModelLoadFailed(f"{self.name}/{folder}: {' '.join(str(error).split())}") from error
        return module.eval().requires_grad_(False)

    def _weights(self, folder: str) -> dict[str, Tensor]:
        file = folder_file(self.name, f"{folder}/model.safetensors", self.revision)
        if file is not None:
            from safetensors.torch import load

            return load(file.read_bytes())
        file = folder_file(self.name, f"{folder}/pytorch_model.bin", self.revision)
        if file is None:
            raise ModelLoadFailed(f"{self.name}/{folder} has neither model.safetensors nor pytorch_model.bin.")
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return weights

    def _json(self, file: str) -> dict[str, Any]:
        found = folder_file(self.name, file, self.revision)
        return {} if found is None else dict(json.loads(Path(found).read_text(encoding="utf-8")))

    def _refused(self, what: str) -> ModelLoadFailed:
        return ModelLoadFailed(f"The sentence-transformers model {self.name} {what}, which is not supported. {_FIX}.")
