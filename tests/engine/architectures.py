"""Tiny random models of many architectures, built from their configs: no download, real weights, real forwards.

Each has about 0.1 M parameters and a vocabulary of 160. Windows and chunks are 16 tokens, so that prompts of a few
dozen tokens cross them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

VOCAB = 160
IMAGE_TOKEN = 155

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_WINDOW = {"sliding_window": 16}
_ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}

DECODERS: dict[str, dict[str, Any]] = {
    "afmoe": {**_EXPERTS, **_WINDOW},
    "apertus": {},
    "arcee": {},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8, "n_inner": 96},
    "cohere": {},
    "cohere2": _ALTERNATING,
    "ctrl": {},
    "deepseek_v2": {**_EXPERTS, **_LATENT},
    "deepseek_v3": {**_EXPERTS, **_LATENT},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": 16, "sliding_window_pattern": 2},
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3_text": _ALTERNATING,
    "gemma3n_text": {
        **_ALTERNATING,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {**_WINDOW, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "glm": {},
    "glm4": {},
    "glm4_moe": _EXPERTS,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": {**_EXPERTS, **_WINDOW},
    "gptj": {"rotary_dim": 8, "n_inner": 96},
    "granite": {},
    "granitemoehybrid": {**_EXPERTS, **_MAMBA2, "layer_types": ["mamba", "attention"] * 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        **_EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "lfm2": {},
    "llama": {},
    "llama4_text": {**_EXPERTS, "attention_chunk_size": 16, "no_rope_layers": [1, 0, 1, 0]},
    "longcat_flash": {
        **_EXPERTS,
        **_LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2, "chunk_size": 8},
    "minicpm3": _LATENT,
    "ministral": _WINDOW,
    "mistral": _WINDOW,
    "mixtral": _EXPERTS,
    "modernbert-decoder": {"local_attention": 16},
    "mpt": {},
    "nemotron": {},
    "nemotron_h": {
        "hybrid_override_pattern": "M*M*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmo_hybrid": _DELTA,
    "olmoe": _EXPERTS,
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": _WINDOW,
    "phimoe": {**_EXPERTS, **_WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": {},
    "qwen3_5_text": _DELTA,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 32},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "sliding_window": 16, "use_sliding_window": True},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "trocr": {},
    "xglm": {},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "n_mamba_heads": 2,
    },
    "zaya": {**_EXPERTS, "num_experts_per_tok": 1},
}

NOT_HELD: dict[str, dict[str, Any]] = {
    "cpmant": {"num_attention_heads": 4, "dim_head": 16, "dim_ff": 96},
    "minimax": {},
    "openai-gpt": {},
    "recurrent_gemma": {},
    "rwkv": {},
    "xlm": {},
    "xlstm": {"num_heads": 4},
}
"""Decoders that keep state outside their cache, bring a cache class of their own, or have no cache."""

_ENCODER_DECODER = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
ENCODER_DECODERS = ("bart", "blenderbot-small", "led", "longt5", "marian", "mbart", "mt5", "pegasus", "t5", "umt5")

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def randomised(build: Callable[[], Any]) -> Any:
    """A model whose logits differ clearly: matrices scaled by their width, vectors near where they start."""
    torch.manual_seed(0)
    model = build()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.data.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.data.add_(0.05 * noise)
    return model.eval()


def decoder(kind: str, **overrides: Any) -> Any:
    """A causal language model of a transformers model type."""
    settings = {**_DECODER, **DECODERS.get(kind, {}), **overrides}
    config = AutoConfig.for_model(kind, **{k: v for k, v in settings.items() if (k, v) != ("head_dim", None)})
    return randomised(lambda: AutoModelForCausalLM.from_config(config))


def encoder_decoder(kind: str) -> Any:
    """A text-to-text model of a transformers model type."""
    return randomised(lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **_ENCODER_DECODER)))


def whisper() -> Any:
    """Speech to text: spectrograms of 8 bins and 60 frames."""
    config = transformers.WhisperConfig(
        **_ENCODER_DECODER, num_mel_bins=8, max_source_positions=30, max_target_positions=128
    )
    return randomised(lambda: transformers.WhisperForConditionalGeneration(config))


def llava(kind: Any = None, vocab_size: int = VOCAB, image_token_id: int = IMAGE_TOKEN) -> Any:
    vision = transformers.CLIPVisionConfig(**_VISION, projection_dim=32)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**{**_DECODER, "vocab_size": vocab_size}),
        image_token_id=image_token_id,
        image_seq_length=4,
    )
    return randomised(lambda: (kind or transformers.LlavaForConditionalGeneration)(config))


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_VISION).to_dict(),
        text_config=transformers.Gemma3TextConfig(**_DECODER, **_ALTERNATING).to_dict(),
        image_token_id=IMAGE_TOKEN,
        boi_token_id=156,
        eoi_token_id=157,
        mm_tokens_per_image=4,
    )
    return randomised(lambda: transformers.Gemma3ForConditionalGeneration(config))


def idefics3() -> Any:
    config = transformers.Idefics3Config(
        vision_config={**_VISION, "patch_size": 7},
        text_config=transformers.LlamaConfig(**_DECODER).to_dict(),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    return randomised(lambda: transformers.Idefics3ForConditionalGeneration(config))


def paligemma() -> Any:
    text = transformers.GemmaConfig(**{**_DECODER, "num_hidden_layers": 2})
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**_VISION, num_image_tokens=4).to_dict(),
        text_config=text.to_dict(),
        image_token_id=IMAGE_TOKEN,
        projection_dim=_DECODER["hidden_size"],
    )
    return randomised(lambda: transformers.PaliGemmaForConditionalGeneration(config))


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(
        text_config={**_DECODER, "rope_parameters": rope},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=IMAGE_TOKEN,
        video_token_id=154,
        vision_start_token_id=153,
        vision_end_token_id=152,
    )
    return randomised(lambda: transformers.Qwen2VLForConditionalGeneration(config))


def _pixels(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _is_image(ids: list[int]) -> torch.Tensor:
    return torch.tensor([[int(token_id == IMAGE_TOKEN) for token_id in ids]])


Media = Callable[[list[int], int], Mapping[str, torch.Tensor]]

VISION: dict[str, tuple[Callable[[], Any], list[int], Media]] = {
    "llava": (llava, [IMAGE_TOKEN] * 4, lambda ids, seed: {"pixel_values": _pixels((1, 3, 28, 28), seed)}),
    "idefics3": (idefics3, [IMAGE_TOKEN] * 4, lambda ids, seed: {"pixel_values": _pixels((1, 1, 3, 28, 28), seed)}),
    "gemma3": (
        gemma3,
        [IMAGE_TOKEN] * 4,
        lambda ids, seed: {"pixel_values": _pixels((1, 3, 28, 28), seed), "token_type_ids": _is_image(ids)},
    ),
    "qwen2_vl": (
        qwen2_vl,
        [153, *[IMAGE_TOKEN] * 6, 152],
        lambda ids, seed: {
            "pixel_values": _pixels((24, 3 * 2 * 14 * 14), seed),
            "image_grid_thw": torch.tensor([[1, 4, 6]]),
            "mm_token_type_ids": _is_image(ids),
        },
    ),
}
"""Vision-language models: how to build one, the tokens of one image, and the tensors of a prompt that has it."""
