"""Which engine serves the types of `zoo.py`, as documentation and tests say."""

from __future__ import annotations

INDEXED = ("axk2", "deepseek_v32", "dots3_note_text", "glm5_next", "glm_moe_dsa", "hy_v4", "qwen4_exp_text")
ENCODED = (
    *("canary", "cohere_asr", "encoder-decoder", "florence2", "moonshine", "speech_to_text", "speecht5"),
    *("switch_transformers", "t5gemma", "vision-encoder-decoder"),
)
COUNTED = ("inkling_text", "moshi", "moss_transcribe_diarize", "roformer", "vibevoice_asr")
BATCHED = (*INDEXED, *ENCODED, *COUNTED, "evolla", "janus")

GENERATED = {
    "blip": "argument: 'pixel_values'",
    "blip-2": "argument: 'pixel_values'",
    "deepseek_v4": "cache layer DeepseekV4CSACache",
    "fsmt": "its forward gives other results with a cache than without",
    "idefics": "continuous batching cannot run it",
    "minimax_m3_vl_text": "cache layer MiniMaxM3VLSparseCacheLayer",
    "mllama": "layers keep columns for images",
    "qwen3_omni_moe": "its forward takes no cache",
    "reformer": "it has its own cache class",
    "unlimited_ocr": "cache layer UnlimitedOcr",
}
"""Types that get the generate engine, and what the warning at load says."""
