"""The table of request keys of other servers, for every route.

They are OpenAI's that this server has no use for, and those of vLLM, SGLang, llama.cpp, Ollama, TGI, transformers,
LMDeploy, TabbyAPI, Aphrodite, Fireworks and some clients. `tests/openai/fields/foreign_names.json` has names with
the versions they were read at; docs/reference/foreign_fields.md shows the table. A field that does something else
here than there is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.openai.fields import other_servers_values as convert
from deployments.openai.fields.other_servers import Given, Harmless, Means, Row, Rows, Spread
from deployments.openai.fields.other_servers import refused as _refused


def _harmless(names: str) -> dict[str, Row]:
    return dict.fromkeys(names.split(), Harmless())


def _same(names: str, ours: str) -> dict[str, Row]:
    """Rows of names that mean a field of ours, with the same values."""
    return dict.fromkeys(names.split(), Means(ours, lambda value, _: {ours: value}))


def _means(names: str, ours: str, conversion: Callable[[Any, Given], Given]) -> dict[str, Row]:
    return dict.fromkeys(names.split(), Means(ours, conversion))


def _without(rows: Rows, *names: str) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if name not in names}


def _limit(ours: str) -> dict[str, Row]:
    """Rows of the limits on new tokens, for a field whose null is as many as fit; llama.cpp and Ollama write -1."""
    return {
        **_same("max_new_tokens", ours),
        **_means("n_predict num_predict", ours, lambda value, _: {ours: None if value in (-1, -2) else value}),
    }


_NOT_INSIDE = _refused("capture interventions", [], instead="this route does not look inside the model; leave it out")
_BOOKKEEPING = _harmless(
    "metadata store service_tier safety_identifier prompt_cache_retention prompt_cache_options rid"
)
_CHAT = "send it to /v1/chat/completions"
_OTHER_MODEL = "configure a model of its own for it"
_NATIVE = "it belongs to another server's own route; send 'prompt' or 'messages' and fields of their own"

_SAMPLERS: Rows = {
    **_same("typical typ_p", "typical_p"),
    **_same("min_new_tokens", "min_tokens"),
    **_same("num_return_sequences n_cmpl", "n"),
    **_same("stop_strings stop_sequences stop_sequence stop_words stop_conditions", "stop"),
    **_same("allowed_tokens", "allowed_token_ids"),
    **_same("sampling_seed random_seed", "seed"),
    **_same("regex", "guided_regex"),
    **_same("json_schema", "guided_json"),
    **_means("format", "response_format", convert.constraint_of_format),
    **_means("grammar", "guided_json, guided_regex", convert.constraint_of_grammar),
    **_means("do_sample", "temperature", convert.do_sample),
    **_means("repeat_penalty", "repetition_penalty", convert.repeat_penalty),
    **_means("repeat_last_n", "repetition_penalty", convert.repeat_last_n),
    **_means("penalize_nl penalize_newline", "repetition_penalty", convert.penalize_newline),
    **_means("truncate", "truncate_prompt_tokens", convert.truncate),
    "options": Spread(),
    **_refused("ebnf", "", instead="send a Lark grammar as structured_outputs.grammar"),
    **_refused("structural_tag stop_regex", instead="send structured_outputs or stop strings"),
    **_refused("max_length min_length", instead="it counts the prompt too; send max_tokens or min_tokens"),
    **_refused("eos_token_id", instead="send stop_token_ids, which are added to the model's own"),
    **_refused("no_stop_trim", False, instead="send include_stop_str_in_output"),
    **_refused("bad_words_ids suppress_tokens", [], instead="send bad_words or logit_bias"),
    **_refused("mirostat mirostat_mode n_indent min_keep top_n_tokens no_repeat_ngram_size", 0),
    **_refused("encoder_no_repeat_ngram_size top_a smoothing_factor", 0),
    **_refused("dry_multiplier xtc_probability dynatemp_range penalty_alpha diversity_penalty", 0),
    **_refused("epsilon_cutoff eta_cutoff skew repetition_decay logit_threshold quadratic_smoothing", 0),
    **_refused("repetition_ngram_size rep_pen_slope dynatemp_min dynatemp_max", 0),
    **_refused("penalty_range repetition_range rep_pen_range dry_range", -1, 0, instead="penalties count all tokens"),
    **_refused("rep_pen", 1, instead="send repetition_penalty"),
    **_refused("min_temp max_temp temp_exponent cfg_scale", 1),
    **_refused("beam_width", 1, instead="send use_beam_search, with the number of beams as n"),
    **_refused("ebnf_full_assistant", False),
    **_refused("logit_bias_type", "input_ids", instead="the keys of logit_bias are token ids"),
    **_refused("top_p_min top_p_decay beam_search_diversity_rate mirostat_target mirostat_lr", 0),
    **_refused("nsigma", -1, 0),
    **_refused("ban_eos_token", False, instead="send ignore_eos"),
    **_refused("banned_tokens custom_token_bans token_ban_ranges", [], "", instead="send logit_bias"),
    **_refused("banned_strings ban_strings", [], "", instead="send bad_words"),
    **_refused("regex_pattern", "", instead="send structured_outputs.regex"),
    **_refused("grammar_string grammar_bnf guided_decoding", "", instead="send structured_outputs"),
    **_refused("sampler_priority sampler_order", [], instead="the order of the samplers is fixed"),
    **_refused("enable_deepconf", False),
    **_refused("preset", ""),
    **_refused("request_output_len max_tokens_to_sample max_completion_length", instead="send max_tokens"),
    **_refused("negative_prompt_ids negative_prompt_attention_mask nvext", {}, []),
    **_refused("top_n_sigma adaptive_target", -1, 0, instead="leave it out, or send -1"),
    **_refused("tfs_z tfs guidance_scale num_beam_groups encoder_repetition_penalty", 1),
    **_refused("chat_format chat_parser grammar_type penalty_prompt"),
    **_refused("thinking_forced_open require_reasoning background", False),
    **_refused("top_h dola_layers exponential_decay_length_penalty sequence_bias forced_bos_token_id"),
    **_refused("forced_eos_token_id begin_suppress_tokens force_words_ids constraints watermarking_config"),
    **_refused("samplers logits_processors logits_processor custom_logit_processor custom_params"),
    **_refused("renormalize_logits remove_invalid_values token_healing watermark watermarking", False),
    **_refused("dynamic_temperature temperature_last grammar_lazy post_sampling_probs", False),
    **_refused("t_max_predict_ms t_max_prompt_ms max_time", -1, 0),
    **_same("reasoning_budget reasoning_budget_tokens thinking_budget thinking_budget_tokens", "thinking_token_budget"),
    **_refused("max_thinking_tokens repetition_detection logit_bias_exp grammar_triggers preserved_tokens", [], {}),
    **_refused("guided_decoding_backend", "auto"),
    **_refused("guided_whitespace_pattern rope_frequency_base rope_frequency_scale"),
    **_refused("cache_implementation assistant_model generation_config"),
    # Nothing without the sampler they belong to, which is refused.
    **_harmless("dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold adaptive_decay"),
    **_harmless("dynatemp_exponent mirostat_tau mirostat_eta smoothing_curve low_memory"),
    **_harmless(
        "reasoning_budget_start_tag reasoning_budget_end_tag reasoning_budget_end_tags reasoning_budget_message"
    ),
}

_REPORTS: Rows = {
    **_refused("return_hidden_states return_routed_experts return_cached_tokens_details return_meta_info", False),
    **_refused("return_token_offsets details decoder_input_details timings_per_token return_progress verbose", False),
    **_refused("output_scores output_logits output_attentions output_hidden_states return_logprob", False),
    **_refused("return_sampling_mask return_entropy return_indexer_topk return_pooled_hidden_states", False),
    **_refused(
        "return_text_in_logprobs return_flat_raw_top_logprobs return_flat_raw_top_logprobs_b64 return_bytes", False
    ),
    **_refused("return_flat_raw_output_top_logprobs return_spec_tokens_details return_weight_versions", False),
    **_refused("sampling_logprobs_mode"),
    **_refused("return_tokens return_prompt_token_ids", False, instead="send return_token_ids"),
    **_refused("return_input_ids_in_sglext return_output_ids_in_sglext", False, instead="send return_token_ids"),
    **_refused("return_mm_kwargs", True, False),
    **_refused("mm_payload", "tensors", "none"),
    **_refused("top_logprobs_num", 0, instead="send logprobs"),
    **_refused("token_ids_logprob", instead="send logprob_token_ids"),
    **_refused("logprob_start_len", -1, instead="send prompt_logprobs"),
    **_refused("routed_experts_prompt_start routed_experts_start_len", 0),
    **_refused("response_fields", []),
    **_refused("spaces_between_special_tokens detokenize stream_reasoning separate_reasoning", True),
    **_refused("parse_tool_calls", True),
    **_refused("reasoning_format", "auto", "deepseek", instead="set reasoning_parser for the model"),
    **_refused("tool_prompt", "", instead="write it into a system message"),
}

# What client libraries merge into the body; some users write it into the body itself.
_MERGED: Rows = {"extra_body": Spread()}

_INPUTS: Rows = {
    **_refused("input_ids input_embeds prompt_embeds", instead="send token ids as 'prompt' to /v1/completions"),
    **_refused("text inputs parameters sampling_params content prompt_string", instead=_NATIVE),
    **_refused("image_data video_data audio_data multimodal_data", [], instead="send parts of a message's content"),
    **_refused("input_prefix input_suffix input_extra suffix", "", [], instead="write it into the prompt"),
    **_refused("system context template system_prompt", "", [], instead=_CHAT),
    **_refused("raw shift _debug_render_only use_audio_in_video", False),
    **_refused("truncation_side", "left"),
    **_refused("max_dynamic_patch min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch"),
    **_refused("media_io_kwargs mm_processor_kwargs images_config video_config", {}),
    **_refused("mm_hashes mm_content_hashes positional_embed_overrides encoder_urls", []),
    **_refused("token_indices_to_pool multi_item_delimiter_indices"),
    **_refused("lora_path lora_id adapter_id adapter_name lora lora_request", [], "", instead=_OTHER_MODEL),
    **_refused("draft_model speculative", instead=_OTHER_MODEL),
    **_refused("decoder_start_token_id bos_token_id task negative_prompt"),
    **_refused("safe_prompt enable_search", False),
    **_refused("mode", "instruct", "chat", instead=_CHAT),
    **_refused("models", [], instead="send one 'model'"),
    **_refused("transforms plugins integrations", [], instead="prompts go to the model as they are"),
    **_refused("context_length_exceeded_behavior", "error", instead="send truncate_prompt_tokens"),
    **_refused("prompt_truncate_len prompt_truncate_length max_prompt_tokens", instead="send truncate_prompt_tokens"),
    **_refused("response_prefix guideline preamble", "", instead="write it into a message or the prompt"),
    **_refused("prompt_template", "", instead="send chat_template"),
    **_refused("template_vars", {}, instead="send chat_template_kwargs"),
}

_SCHEDULING: Rows = {
    **_refused("cache_salt kv_transfer_params ec_transfer_params vllm_xargs session_params", {}),
    **_refused("bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size"),
    **_harmless("stream_interval extra_key custom_labels data_parallel_rank routed_dp_rank disagg_prefill_dp_rank"),
    **_harmless(
        "external_trace_header received_time speculation speculative.n_max speculative.n_min speculative.p_min"
    ),
    **_harmless("speculative.type speculative.types speculative.ngram_size_n speculative.ngram_size_m kv_hints"),
    **_harmless("speculative.ngram_min_hits speculative_ngram generate_window no_log no-log"),
    **_harmless("ngram_corpus_id conversation_id routing_key log_metrics no_logs kv_router_hint"),
    **_harmless("cache_prompt id_slot slot_id n_keep n_discard n_cache_reuse sse_ping_interval backend_sampling"),
    **_harmless("keep_alive num_ctx num_keep num_batch num_gpu main_gpu num_thread num_gqa use_mmap use_mlock numa"),
    **_harmless("low_vram f16_kv vocab_only logits_all embedding_only draft_num_predict reasoning_control"),
    **_harmless("use_cache use_mtp return_dict_in_generate pad_token_id transformers_version disable_compile"),
    **_harmless("compile_config prefill_chunk_size prompt_lookup_num_tokens max_matching_ngram_size"),
    **_harmless("num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold"),
    **_harmless("assistant_early_exit assistant_lookbehind assistant_ensemble_weight target_lookbehind"),
    **_harmless("is_assistant speculation_type continuous_batching_config cache_config max_cache_len"),
}

_GENERATION: Rows = {**_MERGED, **_BOOKKEEPING, **_SAMPLERS, **_REPORTS, **_INPUTS, **_SCHEDULING}

_TEMPLATE: Rows = {
    **_same("enable_thinking", "chat_template_kwargs.enable_thinking"),
    **_means("think thinking", "chat_template_kwargs", convert.thinking),
}
_VARIABLES = _refused("enable_thinking think thinking", instead="send chat_template_kwargs")
_NO_TEMPLATE = _refused("enable_thinking think thinking reasoning", instead=_CHAT)

CHAT: Rows = {
    **_GENERATION,
    **_TEMPLATE,
    **_limit("max_tokens"),
    **_means("think", "chat_template_kwargs, reasoning_effort", convert.think),
    **_means("reasoning", "reasoning_effort, include_reasoning, chat_template_kwargs", convert.reasoning),
    **_means("n_probs", "logprobs, top_logprobs", convert.chat_logprobs),
    **_harmless("prediction"),
    **_refused("images", [], "", instead="send parts of a message's content"),
    **_refused("reasoning_in_content", False),
    **_refused("citations search_parameters search_settings mcp_servers", [], {}),
    **_refused("enable_reasoning", True),
    **_refused("prompt", instead="send 'messages', or the prompt to /v1/completions"),
    **_refused("input instructions instruction", instead="send 'messages', or the input to /v1/responses"),
    **_refused("max_output_tokens", instead="send max_completion_tokens"),
    **_refused("modalities", ["text"]),
    **_refused("audio web_search_options moderation"),
    **_refused("verbosity", "medium"),
    **_refused("add_special_tokens return_full_text", False),
    **_refused("best_of", 1),
    **_refused("functions", [], instead="send 'tools'"),
    **_refused("function_call", "none", "auto", instead="send 'tool_choice'"),
    **_refused("generation_prompt", ""),
}

COMPLETIONS: Rows = {
    **_GENERATION,
    **_NO_TEMPLATE,
    **_same("max_new_tokens n_predict num_predict max_completion_tokens", "max_tokens"),
    **_same("return_full_text", "echo"),
    **_means("n_probs", "logprobs", lambda value, _: {} if value == 0 else {"logprobs": value}),
    **_refused("messages chat_template chat_template_kwargs documents", {}, instead=_CHAT),
    **_refused("tools tool_choice", [], "none", "auto", instead=_CHAT),
    **_refused("top_logprobs", 0, instead="send the number as 'logprobs'"),
    **_refused("reasoning_effort images generation_prompt continue_final_message", [], "", False, instead=_CHAT),
    **_refused("modalities", ["text"]),
}

RESPONSES: Rows = {
    **_without(_GENERATION, "text"),
    **_TEMPLATE,
    **_limit("max_output_tokens"),
    **_same("max_tokens max_completion_tokens", "max_output_tokens"),
    **_refused("messages", instead="send 'input', or the messages to /v1/chat/completions"),
    **_refused("previous_response_id conversation prompt max_tool_calls context_management moderation"),
    **_refused("image access_programs prompt_logprobs previous_input_messages previous_response"),
    **_refused("background enable_response_messages return_token_ids", False),
    **_refused("truncation", "disabled"),
    **_refused("reasoning_effort", instead="send reasoning.effort"),
    **_refused("include_reasoning", True, instead="skip the items of type 'reasoning'"),
    **_refused("best_of", 1),
    **_refused("n_probs", 0, instead="send top_logprobs"),
}

_BLOCKS: Rows = {
    **_harmless("cache_control service_tier inference_geo speed diagnostics user_profile_id workspace_id betas"),
    **_same("output_format", "output_config.format"),
    **_same("reasoning_effort", "output_config.effort"),
    **_refused("container mcp_servers", [], {}),
}
MESSAGES: Rows = {
    **_without(_GENERATION, "metadata", "service_tier", "system"),
    **_BLOCKS,
    **_same("enable_thinking", "chat_template_kwargs.enable_thinking"),
    **_limit("max_tokens"),
    **_refused("max_completion_tokens max_output_tokens", instead="send max_tokens"),
    **_refused("reasoning", instead="send thinking"),
    **_refused("include_reasoning", True, instead='send thinking {"type": "disabled"}'),
    **_refused("parallel_tool_calls", True, instead="send tool_choice.disable_parallel_tool_use"),
    **_refused("best_of", 1),
    **_refused("logprobs top_logprobs prompt_logprobs n_probs", 0, False),
    **_refused("return_token_ids return_tokens_as_token_ids", False),
    **_refused("stream_options", {}),
    **_NOT_INSIDE,
}
COUNT_TOKENS: Rows = {
    **_MERGED,
    **_BLOCKS,
    **_harmless("metadata max_tokens stream temperature top_p top_k stop_sequences user priority request_id rid"),
    **_same("enable_thinking", "chat_template_kwargs.enable_thinking"),
}

GENERATE: Rows = {
    **_without(_GENERATION, "random_seed", "stop_words"),
    **_NO_TEMPLATE,
    **_same("max_new_tokens n_predict num_predict max_tokens max_completion_tokens", "max_output_len"),
    **_harmless("only_return_output pad_id"),
    **_refused("n num_return_sequences n_cmpl", 1),
    **_refused("prompt_logprobs messages chat_template chat_template_kwargs logprobs n_probs", False, 0, instead=_CHAT),
    **_refused("return_token_ids return_tokens_as_token_ids", False),
    **_refused("stream_options", {}),
    **_NOT_INSIDE,
}

EMBEDDINGS: Rows = {
    **_MERGED,
    **_NOT_INSIDE,
    **_harmless("request_id rid keep_alive metadata"),
    **_VARIABLES,
    **_same("content inputs prompt", "input"),
    **_same("truncation_direction", "truncation_side"),
    **_means("truncate", "truncate_prompt_tokens, truncation_side", convert.truncated_embedding),
    **_means("embd_normalize", "normalize", convert.embedding_norm),
    **_refused("embed_dtype", "float32"),
    **_refused("endianness", "native", "little"),
    **_refused("padding", "do_not_pad"),
    **_refused("mm_processor_kwargs media_io_kwargs options", {}),
    **_refused("cache_salt embed_override_token_id embed_overrides"),
    **_refused("lora_path adapter_id lora lora_request", [], "", instead=_OTHER_MODEL),
    **_refused("input_type task instruction", "", instead="send prompt_name, or write the instruction into the text"),
    **_refused("image_data texts images", [], instead="send them in 'input' or 'messages'"),
}

_OURS = "which is not here; this server's takes 'prompt' or 'messages', and the continuations to score in 'choices'"
_VLLM_SCORE = f"it is a field of vLLM's /score, which compares texts, {_OURS}"
_SGLANG_SCORE = f"it is a field of SGLang's /v1/score, which scores token ids after items, {_OURS}"

SCORE: Rows = {
    **_MERGED,
    **_harmless("metadata request_id rid"),
    **_VARIABLES,
    **_refused("text_1 text_2 queries documents data_1 data_2 use_activation", instead=_VLLM_SCORE),
    **_refused("instruction max_tokens_per_doc max_tokens_per_query", instead=_VLLM_SCORE),
    **_refused("query items label_token_ids apply_softmax item_first", instead=_SGLANG_SCORE),
    **_refused("score_extraction_token return_token_logprobs", instead=_SGLANG_SCORE),
    **_refused("embed_override_token_id query_embed_overrides item_embed_overrides", instead=_SGLANG_SCORE),
    **_refused("top_n return_documents instruct"),
    **_refused("return_pooled_hidden_states", False),
    **_refused("truncate_prompt_tokens truncation_side padding cache_salt"),
    **_refused("top_k", 0),
    **_refused("temperature top_p", 1),
    **_refused("mm_processor_kwargs", {}),
    **_refused("add_special_tokens", True),
}

DECISIONS: Rows = {
    **_MERGED,
    **_harmless("safety_identifier prompt_cache_options metadata request_id rid"),
    **_VARIABLES,
    **_NOT_INSIDE,
}

TOKENIZE: Rows = {
    **_MERGED,
    **_harmless("user request_id rid"),
    **_TEMPLATE,
    **_same("content text", "prompt"),
    **_same("add_special", "add_special_tokens"),
    **_refused("parse_special", True),
    **_refused("with_pieces", False),
    **_refused("mm_processor_kwargs media_io_kwargs", {}),
    **_refused("truncate_prompt_tokens truncate truncation_side", False),
}
DETOKENIZE: Rows = {
    **_harmless("user request_id rid"),
    **_refused("skip_special_tokens", False, instead="special tokens are part of the text; leave it out"),
}

TRANSLATIONS: Rows = {
    **_NOT_INSIDE,
    **_harmless("metadata request_id rid audio_duration_s"),
    **_same("max_new_tokens", "max_completion_tokens"),
    **_refused("audio_data", instead="send 'file'"),
    **_refused("watermarking", False),
    **_refused("hotwords penalty_decay vad_filter"),
    **_refused("to_language", "en", "english"),
    **_refused("use_beam_search include_stop_str_in_output", False),
    **_refused("min_tokens min_new_tokens", 0),
    **_refused("n length_penalty beam_size best_of num_beams", 1),
    **_refused("vllm_xargs", {}),
    **_refused("stop stop_token_ids max_tokens", []),
}
TRANSCRIPTIONS: Rows = {
    **TRANSLATIONS,
    **_refused("to_language"),
    **_refused("chunking_strategy", "auto"),
    **_refused("keywords languages known_speaker_names known_speaker_references", []),
}

# Objects inside requests.
STREAM_OPTIONS: Rows = {}
RESPONSE_FORMAT: Rows = {
    **_same("value", "schema"),
    **_refused("structural_tag structures triggers at_least_one format"),
}
STRUCTURED_OUTPUTS: Rows = {
    **_refused("structural_tag whitespace_pattern"),
    **_refused("disable_any_whitespace disable_additional_properties disable_fallback", False),
    **_harmless("_backend _backend_was_auto"),
}
REASONING: Rows = {**_refused("enabled exclude max_tokens", instead="send chat_template_kwargs")}
