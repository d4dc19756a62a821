"""The keys of the objects within a conversation and its tools: those that are read, and the table of the others."""

from __future__ import annotations

from deployments.openai.fields.other_servers import Harmless, Row, Scope
from deployments.openai.fields.other_servers import refused as _refused

# What clients keep beside a message, a part or a tool for themselves, or for a cache that is not here.
_KEPT = "id index metadata cache_control provider_specific_fields extra_content"


def _scope(read: str, harmless: str = "", refused: dict[str, Row] | None = None) -> Scope:
    rows: dict[str, Row] = dict.fromkeys(f"{_KEPT} {harmless}".split(), Harmless())
    fields = read.split()
    return Scope({name: row for name, row in (rows | (refused or {})).items() if name not in fields}, fields)


MESSAGE = _scope(
    "role content name tool_calls tool_call_id reasoning reasoning_content refusal annotations audio function_call",
    "type object created created_at timestamp status phase source model usage weight citations reasoning_details "
    "thinking_blocks signature additional_kwargs response_metadata usage_metadata example parsed error finish_reason",
    _refused("prefix partial", False, instead="send continue_final_message")
    | _refused("images", [], instead="send them as parts of 'content'"),
)
ITEM = _scope(
    "type role content call_id name arguments output summary encrypted_content",
    "status phase namespace created_by created_at caller",
)
PART = _scope(
    "type text refusal image_url image input_audio audio audio_url video video_url file file_id file_url file_data "
    "filename url path data format",
    "annotations logprobs uuid prompt_cache_breakpoint citations",
)
MEDIUM = _scope("url data format file_id file_data filename", "uuid")
CALL = _scope("id type function", "thought_signature caller")
CALLED = _scope("name arguments", "parsed_arguments thought_signature")

_PARAMETERS = _refused("input_schema inputSchema parametersJsonSchema arguments", instead="send 'parameters'")
FUNCTION = _scope("name description parameters strict return", "defer_loading output_schema", _PARAMETERS)
FLAT_TOOL = _scope("type name description parameters strict return", "defer_loading output_schema", _PARAMETERS)
TOOL = _scope("type function", "defer_loading", _refused("strict", False, instead="send it in 'function'"))
CHOICE = _scope(
    "type function name mode tools allowed_tools",
    "",
    _refused("disable_parallel_tool_use", False, instead="send parallel_tool_calls"),
)
NAMED = _scope("name", "description parameters strict")
ALLOWED = _scope("mode tools")

# Of the Messages API.
MESSAGE_OF_BLOCKS = _scope("role content", "type model usage container stop_reason stop_sequence stop_details")
BLOCK = _scope(
    "type text source thinking signature data id name input tool_use_id content is_error title context",
    "citations caller toolset_name",
)
SOURCE = _scope("type media_type data url content")
TOOL_OF_BLOCKS = _scope(
    "type name description input_schema strict", "defer_loading eager_input_streaming input_examples allowed_callers"
)
CHOICE_OF_BLOCKS = _scope("type name disable_parallel_tool_use")
