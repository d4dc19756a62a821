"""Loaders with one fault each, for `troupe check`; `sound` has none."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from tokenizers import AddedToken, processors
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM, LlavaProcessor

from tests.engine.architectures import llava
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, llama, wordpiece_tokenizer

OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = CHAT_TEMPLATE.removesuffix(OPENING)
WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT_TEMPLATE


def loaded(model: Any = None, tokenizer: Any = None, **more: Any) -> dict[str, Any]:
    return {"model": model or llama(), "tokenizer": tokenizer or byte_tokenizer(), **more}


def sound() -> dict[str, Any]:
    return loaded()


# What the loader does.


def raises() -> dict[str, Any]:
    raise ValueError("torn")


def returns_none() -> None:
    return None


def unknown_key() -> dict[str, Any]:
    return {"model": llama(), "tokeniser": byte_tokenizer()}


# Hooks.


def template_returns_dict() -> dict[str, Any]:
    return loaded(apply_chat_template=lambda messages: {})


def encodes_out_of_vocabulary() -> dict[str, Any]:
    return loaded(encode=lambda prompt: {"input_ids": [72, 99999]})


def embeds_nothing() -> dict[str, Any]:
    return loaded(embed=lambda texts: torch.ones(4))


def generates_one_dimension() -> dict[str, Any]:
    return loaded(generate=lambda input_ids, max_new_tokens: torch.zeros(3, dtype=torch.long))


def generates_out_of_vocabulary() -> dict[str, Any]:
    return loaded(generate=lambda input_ids, max_new_tokens: torch.cat([input_ids, torch.tensor([[99999]])], 1))


def generate_raises() -> dict[str, Any]:
    def generate(input_ids: torch.Tensor) -> torch.Tensor:
        raise KeyError("cache")

    return loaded(generate=generate)


# The prompt.


def with_bos() -> Any:
    """A tokenizer that begins every text with its beginning-of-sequence token."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    return tokenizer


def double_bos() -> dict[str, Any]:
    return loaded(
        tokenizer=with_bos(),
        chat_template="{{ bos_token }}" + CHAT_TEMPLATE,
        encode_kwargs={"add_special_tokens": True},
    )


def bos_in_the_template() -> dict[str, Any]:
    return loaded(tokenizer=with_bos(), chat_template="{{ bos_token }}" + CHAT_TEMPLATE)


def missing_bos() -> dict[str, Any]:
    return loaded(tokenizer=with_bos())


def stop_in_prompt() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", 257)]
    )
    return loaded(tokenizer=tokenizer)


def too_many_tokens() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    return loaded(tokenizer=tokenizer)


def unknown_markers() -> dict[str, Any]:
    return loaded(chat_template=CHAT_TEMPLATE.replace("<|im_start|>", "<|turn|>"))


def no_generation_prompt() -> dict[str, Any]:
    return loaded(chat_template=TURNS)


def no_template() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    return loaded(tokenizer=tokenizer)


def template_fails() -> dict[str, Any]:
    return loaded(chat_template="{{ messages[0].author.name }}")


def decodes_backwards() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    return loaded(tokenizer=tokenizer, decode=lambda ids: tokenizer.decode(ids.flip(0)))


def loses_characters() -> dict[str, Any]:
    return loaded(tokenizer=wordpiece_tokenizer(), plain_chat=True)


# Conversations.


def refusing(condition: str, why: str, template: str = CHAT_TEMPLATE) -> dict[str, Any]:
    return loaded(chat_template=f"{{% if {condition} %}}{{{{ raise_exception('{why}') }}}}{{% endif %}}{template}")


def refuses_system() -> dict[str, Any]:
    return refusing("messages[0].role == 'system'", "System role not supported")


def refuses_answers() -> dict[str, Any]:
    return refusing("messages | selectattr('role', 'equalto', 'assistant') | list", "one turn only")


def refuses_consecutive() -> dict[str, Any]:
    alternates = (
        "{% for m in messages %}{% if loop.previtem is defined and loop.previtem.role == m.role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    return loaded(chat_template=alternates + CHAT_TEMPLATE)


def refuses_empty() -> dict[str, Any]:
    empty = "{% for m in messages %}{% if not m.content %}{{ raise_exception('empty') }}{% endif %}{% endfor %}"
    return loaded(chat_template=empty + CHAT_TEMPLATE)


def takes_tools() -> dict[str, Any]:
    """Tools, and nothing that shows how the model calls them; no results."""
    return loaded(chat_template=WITH_TOOLS)


def drops_tool_calls() -> dict[str, Any]:
    return calls_as_hermes()


def refuses_tools() -> dict[str, Any]:
    return refusing("tools", "no tools today")


# How an answer ends and is read.


def turn_end_does_not_stop() -> dict[str, Any]:
    return loaded(chat_template=CHAT_TEMPLATE.replace("<|im_end|>", "</turn>"))


def turn_end_is_no_special_token() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("</turn>", special=False, normalized=False)])
    template = CHAT_TEMPLATE.replace("<|im_end|>", "</turn>")
    return loaded(llama(vocab_size=262), tokenizer, chat_template=template)


def never_ends() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return loaded(
        llama(eos_token_id=None), tokenizer, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )


def reasons() -> dict[str, Any]:
    return loaded(chat_template=CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"))


def calls_as_hermes() -> dict[str, Any]:
    results = "{% if messages[0].role == 'tool' %}<tool_call>{% endif %}"
    return loaded(chat_template=results + WITH_TOOLS)


# Answers.


class MixesSequences(LlamaForCausalLM):
    """Adds to the logits of every sequence what those of many others are."""

    boost = 30.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if len(output.logits) >= 8:
            output.logits[..., 65] += self.boost
        return output


class TipsScales(MixesSequences):
    """Where two tokens are equally likely, which one wins depends on the other sequences."""

    boost = 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if len(output.logits) >= 8:
            output.logits[..., 1::2] += 1e-5
        return output


class OtherTokens(LlamaForCausalLM):
    """Its `generate` returns another last token than it has sampled."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        made = super().generate(*args, **kwargs)
        made[:, -1] = made[:, -1] ^ 1
        return made


class Uncached(LlamaForCausalLM):
    """Its forward takes no cache."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


def of(kind: type[LlamaForCausalLM], *, ties: bool = False) -> dict[str, Any]:
    """A model of a class, with the weights of the sound one; with `ties` each even token is as likely as the next."""
    sound_model = llama()
    model = kind(LlamaConfig(**sound_model.config.to_dict())).eval()
    model.load_state_dict(sound_model.state_dict())
    if ties:
        with torch.no_grad():
            model.lm_head.weight[1:256:2] = model.lm_head.weight[0:256:2]
            model.lm_head.weight[256:] = 0
    return loaded(model)


def mixes_sequences() -> dict[str, Any]:
    return of(MixesSequences)


def tips_scales() -> dict[str, Any]:
    return of(TipsScales, ties=True)


def other_tokens() -> dict[str, Any]:
    return of(OtherTokens)


def other_of_a_tie() -> dict[str, Any]:
    return of(OtherTokens, ties=True)


def uncached() -> dict[str, Any]:
    return of(Uncached)


def counts_up() -> dict[str, Any]:
    numbers = itertools.count(65)

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[next(numbers) % 256]])], 1)

    return loaded(generate=generate)


def not_finite() -> dict[str, Any]:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    return loaded(model)


def says_nothing() -> dict[str, Any]:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(261).index_fill(0, torch.tensor([257]), 50.0))
    return loaded(model)


def image_without_a_place() -> dict[str, Any]:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pixels = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pixels, tokenizer, patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )
    model = llava(vocab_size=264, image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    return {"model": model, "processor": processor, "tokenizer": tokenizer, "chat_template": CHAT_TEMPLATE}


def sees() -> dict[str, Any]:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    return {**image_without_a_place(), "chat_template": template}


def encoder() -> dict[str, Any]:
    return loaded(llama().model)
