"""Loaders of tiny models with random weights, for the API over the real engines."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.engine.architectures import llava
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, llama

_CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>"
TOOLS_TEMPLATE = "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>\n{% endif %}" + CHAT_TEMPLATE.replace(
    "<|im_end|>", _CALLS
)


def load_model(template: str = CHAT_TEMPLATE, length: int = 1024) -> dict[str, Any]:
    torch.set_num_threads(1)
    model, tokenizer = llama(max_position_embeddings=length), byte_tokenizer()
    return {"model": model, "tokenizer": tokenizer, "chat_template": template}


def with_tools() -> dict[str, Any]:
    return load_model(TOOLS_TEMPLATE, 4096)


def with_images() -> dict[str, Any]:
    """A Llava whose template writes the images of users."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    part = "{{ '<image>' if part.type == 'image' and m.role == 'user' else part.text }}"
    parts = f"{{% for part in m.content %}}{part}{{% endfor %}}"
    content = f"{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}{parts}{{% endif %}}"
    tokenizer.chat_template = TOOLS_TEMPLATE.replace("{{ m['content'] }}", content)
    size = {"height": 28, "width": 28}
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    settings = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    processor = LlavaProcessor(pixels, tokenizer, **settings)
    model = llava(vocab_size=264, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    return {"model": model, "processor": processor, "tokenizer": tokenizer}


class Convolved(torch.nn.Module):
    """A module whose output is that of a convolution over its channels."""

    def __init__(self, inner: torch.nn.Module, size: int, groups: int) -> None:
        super().__init__()
        self.inner = inner
        self.conv = torch.nn.Conv1d(size, size, 1, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.inner(x).transpose(1, 2)).transpose(1, 2)


def with_convolutions(groups: int = 1) -> dict[str, Any]:
    loaded = load_model()
    for layer in loaded["model"].model.layers:
        layer.mlp = Convolved(layer.mlp, layer.hidden_size, groups)
    return loaded


MARKUP = "<img src=x onerror='window.ran = 1'><script>window.ran = 2</script></pre><style>*{display:none}</style>"


def with_generate() -> dict[str, Any]:
    """A model with a `generate` hook, which gives no log-probabilities; what it writes is markup."""
    loaded = load_model()

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        said = loaded["tokenizer"](f"{MARKUP}<|im_end|>", return_tensors="pt", add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, said[:, :max_new_tokens]], dim=1)

    return {**loaded, "generate": generate}


def with_embed() -> dict[str, Any]:
    def embed(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(len(text)), 3.0, 4.0] for text in texts])

    return {**load_model(), "embed": embed}


def with_broken_embed() -> dict[str, Any]:
    return {**load_model(), "embed": lambda texts: [1.0]}
