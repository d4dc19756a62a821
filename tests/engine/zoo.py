"""Tiny random models of types that need care: each stands for a cause that made batches or `generate` go wrong.

A config class says which fields it has; `_TEXT` and `_SIDE` say how small each is. A vocabulary has 512 ids; windows
and indices have 16 columns.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engine.architectures import randomised
from tests.engine.lacking import INSTALLED, is_older
from tests.engine.running import NO_EOS, generation

VOCAB = 512
MEDIA_TOKENS = {"image": 510, "video": 511, "audio": 509}


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


_TEXT: dict[str, Any] = {
    **_each("vocab_size vocab_size_per_layer_input unpadded_vocab_size", VOCAB),
    **_each("max_position_embeddings model_max_length max_seq_len", 512),
    **_each("intermediate_size dense_intermediate_size d_inner d_ff ffn_dim", 128),
    **_each("hidden_size moe_hidden_size d_model embedding_size projection_dim encoder_ffn_dim decoder_ffn_dim", 64),
    **_each("rel_extent", 64),
    **_each("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size share_expert_dim", 32),
    **_each("shared_experts_intermediate_size q_lora_rank", 32),
    **_each("head_dim d_kv kv_lora_rank v_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim", 16),
    # Few index heads tie at exactly 0, and a tie goes by column.
    **_each("index_n_heads index_head_dim index_topk hidden_size_per_layer_input query_pre_attn_scalar", 16),
    **_each("sliding_window sliding_window_size attention_chunk_size swa_head_dim", 16),
    **_each("qk_rope_head_dim qk_nope_head_dim index_block_size d_rel gated_norm_rank laurel_rank rotary_dim", 8),
    **_each("num_hidden_layers num_attention_heads num_heads n_head n_heads linear_num_value_heads", 4),
    **_each("linear_num_heads swa_num_attention_heads encoder_attention_heads decoder_attention_heads", 4),
    **_each("num_encoder_attention_heads num_decoder_attention_heads", 4),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("num_layers num_decoder_layers n_layer n_layers index_topk_blocks", 3),
    **_each("num_key_value_heads linear_num_key_heads swa_num_key_value_heads encoder_layers decoder_layers", 2),
    **_each("num_encoder_layers sliding_window_pattern layer_group_size", 2),
    **_each("num_experts_per_tok moe_topk moe_k top_k_experts", 2),
    **_each("n_group topk_group first_k_dense_replace", 1),
    **_each("initializer_range init_std", 0.3),
    **_each("sep_token_id eod_token_id", 3),
    "initializer_factor": 3.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

_SIDE: dict[str, Any] = {
    **_each("vocab_size out_hidden_size output_dim output_proj_dims adapter_out_dim text_hidden_size", 64),
    **_each("num_position_embeddings max_source_positions max_position_embeddings", 64),
    **_each("intermediate_size encoder_ffn_dim mlp_dim d_ff", 48),
    **_each("hidden_size hidden_dim embed_dim d_model projection_dim projection_hidden_dim encoder_hidden_size", 32),
    **_each("image_size window_size adapter_in_dim", 32),
    **_each("head_dim d_kv num_mel_bins output_channels downsample_hidden_size moe_intermediate_size", 16),
    **_each("num_patches context_size input_dim max_pos_emb", 16),
    **_each("patch_size subsampling_conv_channels", 8),
    **_each("num_local_experts", 4),
    **_each("num_hidden_layers num_layers depth encoder_layers spatial_merge_size num_key_value_heads", 2),
    **_each("num_attention_heads num_heads encoder_attention_heads attention_heads", 2),
    **_each("fullatt_block_indexes global_attn_indexes", [1]),
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.2,
}
"""Sizes of encoders of pictures and sounds."""

_TEXTUAL = ("text", "decoder", "thinker", "global")
_MARKS = ("_token_id", "_token_index", "image_patch_id", "im_start_id", "im_end_id", "im_newline_id")


class _Text(dict[str, Any]):
    """Settings of a nested config that is one of text whatever its name."""


def _small(cls: Any, given: Mapping[str, Any], side: bool = False) -> Any:
    """A config of a class: what is given, small sizes, and nested configs made in the same way."""
    table = _SIDE if side else _TEXT
    nested = _nested_specs(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in nested}
    found = {n: table[n] for n, default in defaults.items() if n in table and (default is not None or n == "head_dim")}
    if not side:
        found.update(_marks(defaults.items()), pad_token_id=table["pad_token_id"], eos_token_id=table["eos_token_id"])
    if "kv_lora_rank" in defaults:
        found["num_key_value_heads"] = _TEXT["num_attention_heads"]
        found.pop("head_dim", None)
    for key, spec in nested.items():
        inner = given.get(key, {})
        if isinstance(inner, dict):
            found[key] = _nested(spec, inner, side or not (isinstance(inner, _Text) or any(w in key for w in _TEXTUAL)))
    found.update({key: value for key, value in given.items() if key not in found or key not in nested})
    if not hasattr(cls, "sub_configs_defaults"):
        # Such a version takes nested configs as dicts alone.
        found = {key: value.to_dict() if key in nested and value else value for key, value in found.items()}
    return cls(**found)


def _marks(defaults: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """Ids within the small vocabulary for tokens that stand for media or for where they begin and end."""
    found, left = {}, itertools.count(500, -1)
    for name, default in defaults:
        media = name.removesuffix("_id").removesuffix("_index").removesuffix("_token").removesuffix("_patch")
        if not name.endswith(_MARKS) or "pad" in name or name in _TEXT:
            continue
        if media in MEDIA_TOKENS:
            found[name] = MEDIA_TOKENS[media]
        elif isinstance(default, int) and default >= VOCAB:
            found[name] = next(left)
    return found


def _nested_specs(cls: Any) -> Mapping[str, Any]:
    """What a config class says of its nested configs; of a version that says less, what its default config has."""
    found: Mapping[str, Any] | None = getattr(cls, "sub_configs_defaults", None)
    if found is not None:
        return found
    nested = {}
    for name, kind in cls.sub_configs.items():
        try:
            default = type(getattr(cls(), name))
        except ValueError:
            default = kind
        if default is not type(None):
            model_type = getattr(default, "model_type", "")
            nested[name] = SimpleNamespace(config_class=default, model_type=model_type, init_kwargs={})
    return nested


def _nested(spec: Any, given: dict[str, Any], side: bool) -> Any:
    kind = given.get("model_type", spec.model_type)
    generic = not issubclass(spec.config_class, transformers.PretrainedConfig)
    own = {} if "model_type" in given else {k: v for k, v in spec.init_kwargs.items() if isinstance(v, (bool, str))}
    settings = {key: value for key, value in {**own, **given}.items() if key != "model_type"}
    return _small(CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING and generic else spec.config_class, settings, side)


@dataclasses.dataclass(frozen=True)
class Specimen:
    """One tiny model, and the tensors that its prompts may or must have.

    Attributes:
        build: makes it; the same weights every time.
        shapes: of the random tensors of a prompt that shows something.
        media_tokens: how many placeholder tokens stand for them in the prompt.
        fixed: further tensors of such a prompt, by its length.
        text: prompts of text alone are answered.
        generate: the function of a model that its answers are compared with.
    """

    build: Callable[[], Any]
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    media_tokens: int = 0
    fixed: Callable[[int], Mapping[str, torch.Tensor]] = lambda length: {}
    text: bool = True
    generate: Callable[[Any], Callable[..., Any]] = generation

    def showing(self, shapes: Mapping[str, tuple[int, ...]], **others: Any) -> Specimen:
        """The same model with the tensors of its media."""
        return dataclasses.replace(self, shapes=shapes, **others)

    def inputs(self, length: int, seed: int) -> dict[str, torch.Tensor]:
        """The tensors of a prompt of `length` tokens that shows something."""
        generator = torch.Generator().manual_seed(seed)
        made = {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}
        return {**made, **self.fixed(length)}


def _a(kind: str, head: str, *, scaled: bool = False, **given: Any) -> Specimen:
    """A model of a type: what is given of its config, and small sizes.

    Args:
        scaled: its own initialization leaves greedy tokens alike.
    """

    def build() -> Any:
        config_class, config = _config(kind, given)
        module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
        torch.manual_seed(0)
        model = getattr(module, head)(config).float()
        return randomised(lambda: model) if scaled else model.eval()

    return Specimen(build)


def _config(kind: str, given: Mapping[str, Any]) -> tuple[Any, Any]:
    """The config class of a type, and a small config; skips the test if an older version has no such config."""
    if not is_older():
        return CONFIG_MAPPING[kind], _small(CONFIG_MAPPING[kind], given)
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {INSTALLED} has no {kind}")
    try:
        return CONFIG_MAPPING[kind], _small(CONFIG_MAPPING[kind], given)
    except Exception as error:
        pytest.skip(f"transformers {INSTALLED} has no {kind} of this config: {error}")


_WINDOWS = ["sliding_attention", "full_attention"] * 2
_INDEXED = ["linear_attention", "indexed_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_ACOUSTIC = {"num_filters": 4, "depths": [1] * 7, "hidden_size": 16}
_LONGROPE = {
    "original_max_position_embeddings": 100,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 100,
    },
}
_DOTS3 = {
    **_each("swa_num_attention_heads", 4),
    **_each("swa_head_dim sliding_window", 16),
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 16,
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
}
_QWEN4 = {
    "layer_types": _INDEXED,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ple_embed_dim": 16,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 200,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_GLM5 = {
    "qk_rope_head_dim": 0,
    "qk_nope_head_dim": 16,
    "layer_types": _INDEXED,
    "indexer_types": ["shared", "full", "shared", "full"],
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "index_kpool": 4,
}
_COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
_DEEPSEEK4 = {
    "head_dim": 16,
    "num_key_value_heads": 1,
    "o_groups": 2,
    "o_lora_rank": 16,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "layer_types": ["sliding_attention", *_COMPRESSED, "compressed_sparse_attention"],
    "compress_rates": _COMPRESSED,
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "num_nextn_predict_layers": 0,
    "partial_rotary_factor": 0.5,
}
_REFORMER = {
    "is_decoder": True,
    "attention_head_size": 16,
    "attn_layers": ["local", "lsh", "local"],
    "axial_pos_shape": [16, 32],
    "axial_pos_embds_dim": [32, 32],
    "feed_forward_size": 128,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "num_buckets": 8,
    "hash_seed": 0,
}
_JANUS_VQ = {
    "num_embeddings": 32,
    "latent_channels": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "image_token_embed_dim": 32,
}
_DAVIT: dict[str, Any] = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
_DAVIT |= {"patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4]}
_DAVIT |= {"window_size": 4, "projection_dim": 64}
_PHI4_SIDES = {
    "vision_config": {"crop_size": 32},
    "audio_config": {
        "num_blocks": 2,
        **_each("ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels", 32),
    },
}
_EVOLLA = {
    "aligner_num_add_layers": 1,
    "resampler_depth": 1,
    "resampler_dim_head": 16,
    "resampler_heads": 2,
    "resampler_num_latents": 4,
    "protein_encoder_config": {
        **_each("vocab_size hidden_size", 32),
        **_each("num_hidden_layers num_attention_heads", 2),
        "intermediate_size": 48,
    },
}
_MLLAMA = {
    "text_config": {"cross_attention_layers": [1]},
    "vision_config": {
        "num_global_layers": 1,
        "vision_output_dim": 96,
        "intermediate_layers_indices": [0, 1],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    },
}
_SPEECHT5: dict[str, Any] = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "max_text_positions": 512,
}
_SPEECHT5 |= {**_each("num_conv_pos_embeddings num_mel_bins", 16), "num_conv_pos_embedding_groups": 2}
_MOONSHINE = _each("encoder_num_hidden_layers decoder_num_hidden_layers", 2)
_MOONSHINE |= _each("encoder_num_attention_heads decoder_num_attention_heads", 4)
_SPEECH2TEXT = {"max_source_positions": 256, "max_target_positions": 512, "conv_channels": 32}
_SPEECH2TEXT |= {"input_feat_per_channel": 16}
_STARTS = {"decoder_start_token_id": 1}
_BERT = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
_PIXELS = {"pixel_values": (1, 3, 32, 32)}
_SPECTROGRAM = {"input_features": (1, 64, 16)}
_WAVE = {"input_values": (1, 4000)}

_ASR = {"acoustic_tokenizer_encoder_config": _ACOUSTIC, "semantic_tokenizer_encoder_config": _ACOUSTIC}
_JANUS = {"vision_config": {"projection_dim": 64}, "vq_config": _JANUS_VQ}
_SPARSE = ["dense", "sparse", "sparse", "sparse"]
_INKLING = {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "mlp_layer_types": _SPARSE, "log_scaling_n_floor": 16}
_GLM5_CONFIGS = {"text_config": _GLM5, "vision_config": {"projection_intermediate_size": 64}}
_M3 = {"index_n_heads": 2, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "mlp_layer_types": _SPARSE}
_T5GEMMA = {"encoder": _Text(layer_types=_WINDOWS), "decoder": {"layer_types": _WINDOWS}}
_SWITCH = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 2}
_OMNI = {"text_config": {"rope_parameters": _MROPE}, "vision_start_token_id": 505}
_BLIP_TEXT = {"is_decoder": True, "sep_token_id": NO_EOS}
_TILES = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.tensor([[[1]]])}

ZOO: dict[str, Specimen] = {
    "roformer": _a("roformer", "RoFormerForCausalLM", is_decoder=True),
    "moss_transcribe_diarize": _a("moss_transcribe_diarize", "MossTranscribeDiarizeForConditionalGeneration"),
    "vibevoice_asr": _a("vibevoice_asr", "VibeVoiceAsrForConditionalGeneration", **_ASR),
    "phi3-longrope": _a("phi3", "Phi3ForCausalLM", **_LONGROPE),
    "phi4_multimodal-longrope": _a("phi4_multimodal", "Phi4MultimodalForCausalLM", **_LONGROPE, **_PHI4_SIDES),
    "moshi": _a("moshi", "MoshiForCausalLM", audio_encoder_config=None, depth_decoder_config=None),
    "janus": _a("janus", "JanusForConditionalGeneration", **_JANUS).showing(_PIXELS, media_tokens=16),
    "fsmt": _a(
        "fsmt",
        "FSMTForConditionalGeneration",
        scaled=True,
        **_each("src_vocab_size tgt_vocab_size", VOCAB),
        num_beams=1,
    ),
    "unlimited_ocr": _a("unlimited_ocr", "UnlimitedOcrForConditionalGeneration"),
    "inkling_text": _a("inkling_text", "InklingForCausalLM", **_INKLING),
    "blip-2": _a("blip-2", "Blip2ForConditionalGeneration", num_query_tokens=4).showing(
        _PIXELS, media_tokens=4, text=False, generate=lambda model: model.generate
    ),
    "idefics": _a("idefics", "IdeficsForVisionText2Text", cross_layer_interval=2, alpha_initializer="ones").showing(
        {"pixel_values": (1, 1, 3, 32, 32)},
        fixed=lambda length: {"image_attention_mask": torch.ones((1, length, 1), dtype=torch.long)},
        text=False,
    ),
    "blip": _a("blip", "BlipForConditionalGeneration", text_config=_BLIP_TEXT).showing(
        _PIXELS,
        text=False,
        # Its generate names the terminator itself.
        generate=lambda model: lambda eos_token_id, pad_token_id, **kwargs: model.generate(**kwargs),
    ),
    "axk2": _a("axk2", "AXK2ForCausalLM"),
    "deepseek_v32": _a("deepseek_v32", "DeepseekV32ForCausalLM"),
    "glm_moe_dsa": _a("glm_moe_dsa", "GlmMoeDsaForCausalLM", indexer_types=["full", "shared"] * 2),
    "dots3_note_text": _a("dots3_note_text", "Dots3NoteForCausalLM", **_DOTS3),
    "glm5_next": _a("glm5_next", "Glm5NextForConditionalGeneration", **_GLM5_CONFIGS),
    "qwen4_exp_text": _a("qwen4_exp_text", "Qwen4ExpForCausalLM", **_QWEN4),
    "hy_v4": _a("hy_v4", "HYV4ForCausalLM", hc_mult=2),
    "encoder-decoder": _a(
        "encoder-decoder",
        "EncoderDecoderModel",
        scaled=True,
        encoder=_Text(model_type="bert"),
        decoder=_BERT,
        **_STARTS,
    ),
    "t5gemma": _a("t5gemma", "T5GemmaForConditionalGeneration", scaled=True, **_T5GEMMA),
    "florence2": _a("florence2", "Florence2ForConditionalGeneration", scaled=True, vision_config=_DAVIT).showing(
        _PIXELS, media_tokens=17
    ),
    "switch_transformers": _a(
        "switch_transformers", "SwitchTransformersForConditionalGeneration", scaled=True, **_SWITCH
    ),
    "moonshine": _a("moonshine", "MoonshineForConditionalGeneration", **_MOONSHINE).showing(_WAVE, text=False),
    "speech_to_text": _a("speech_to_text", "Speech2TextForConditionalGeneration", scaled=True, **_SPEECH2TEXT).showing(
        _SPECTROGRAM, text=False
    ),
    "canary": _a("canary", "CanaryForConditionalGeneration", encoder_config={"hidden_size": 64}).showing(
        _SPECTROGRAM, text=False
    ),
    "cohere_asr": _a("cohere_asr", "CohereAsrForConditionalGeneration", scaled=True).showing(_SPECTROGRAM, text=False),
    "speecht5": _a("speecht5", "SpeechT5ForSpeechToText", scaled=True, **_SPEECHT5).showing(_WAVE, text=False),
    "vision-encoder-decoder": _a(
        "vision-encoder-decoder",
        "VisionEncoderDecoderModel",
        scaled=True,
        encoder={"model_type": "vit"},
        decoder=_BERT,
        **_STARTS,
    ).showing(_PIXELS, text=False),
    "evolla": _a("evolla", "EvollaForProteinText2Text", **_EVOLLA),
    "mllama": _a("mllama", "MllamaForConditionalGeneration", scaled=True, **_MLLAMA).showing(
        {"pixel_values": (1, 1, 1, 3, 32, 32)}, media_tokens=1, fixed=lambda length: _TILES
    ),
    "deepseek_v4": _a("deepseek_v4", "DeepseekV4ForCausalLM", **_DEEPSEEK4),
    "minimax_m3_vl_text": _a("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", **_M3),
    "reformer": _a("reformer", "ReformerModelWithLMHead", **_REFORMER),
    "qwen3_omni_moe": _a(
        "qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration", enable_audio_output=False, thinker_config=_OMNI
    ).showing({}, generate=lambda model: model.thinker.generate),
}
