"""Every kind of finding that needs action or that a benchmark should know of. docs/check.md has the same table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding.

    Attributes:
        status: `skipped` is a property of the model, such as a template without tools.
        meaning: what was found, for the table.
        fix: what to do about it.
    """

    status: Literal["warning", "error", "skipped"]
    meaning: str
    fix: str


CODES: dict[str, Kind] = {
    "loader-failed": Kind(
        "error",
        "The loader raised an exception, or did not return in time.",
        "Repair what the finding names. `--traceback` shows how it was reached.",
    ),
    "loader-contract": Kind(
        "error",
        "The loader cannot be called with these arguments, or it does not return a model with its tokenizer.",
        "Return a dict or a ModelInfo with `model` and `tokenizer` (docs/loaders.md lists every key).",
    ),
    "hook-contract": Kind(
        "error",
        "A hook of the loader returned something else than its contract says.",
        "Return what docs/loaders.md lists for this hook.",
    ),
    "no-engine": Kind(
        "error",
        "The model is loaded, but no engine can run it.",
        "Give the loader a `generate` hook, or correct the `engine` section of the model.",
    ),
    "load-warnings": Kind(
        "warning",
        "The server logs warnings while it loads the model.",
        "Read the warnings: weights that are random or not used change every answer.",
    ),
    "not-batched": Kind(
        "warning",
        "Continuous batching cannot run the model as `generate` does, so the slower engine runs it.",
        "The answers are those of `generate`. For more speed, remove the reason that the finding names.",
    ),
    "context-cut": Kind(
        "warning",
        "The memory for caches holds less than one request of the model's full context.",
        "Set `engine.memory_gib` higher, or `engine.max_model_len` lower.",
    ),
    "adapter-refused": Kind(
        "error",
        "An adapter over the model cannot be served. Requests for it get a 404 with the reason.",
        "Do what the finding says, or merge the adapter with PEFT (`merge_and_unload`) and serve the merged folder.",
    ),
    "weights-not-finite": Kind(
        "error",
        "Weights are NaN or infinite, so answers are, too.",
        "Load the checkpoint in another dtype (float16 holds numbers up to 65504), or repair the checkpoint.",
    ),
    "no-chat-template": Kind(
        "warning",
        "The model has no chat template, so chats are refused. Completions work.",
        "Set `chat_template` to a template or a file, give the loader an `apply_chat_template` hook, or set "
        "`plain_chat: true`.",
    ),
    "template-fails": Kind(
        "error",
        "The chat template cannot write a conversation of one user message.",
        "Repair the chat template, or give the loader another one (`chat_template`).",
    ),
    "tokens-without-embedding": Kind(
        "warning",
        "The tokenizer has more tokens than the model has embeddings; a prompt with such a token fails.",
        "Use the tokenizer that belongs to the model, or call `model.resize_token_embeddings` before training.",
    ),
    "double-bos": Kind(
        "error",
        "A prompt begins with two beginning-of-sequence tokens.",
        "Write the token in the chat template or in `encode`, not in both: remove `add_special_tokens: true` from "
        "`encode_kwargs`, or the token from the template.",
    ),
    "missing-bos": Kind(
        "warning",
        "The tokenizer puts a beginning-of-sequence token before texts, and the chat template leaves it out.",
        "Begin the chat template with `{{ bos_token }}`, if the model was trained on chats with it.",
    ),
    "no-generation-prompt": Kind(
        "warning",
        "The chat template does not open the assistant's turn, although it marks such turns.",
        "Write the beginning of the assistant's turn under `{% if add_generation_prompt %}`.",
    ),
    "stop-in-prompt": Kind(
        "warning",
        "A prompt ends with a stop token, as if the text had ended.",
        "Keep the tokenizer from adding it (`add_eos_token: false`), or write the beginning of the assistant's turn in "
        "the chat template.",
    ),
    "round-trip": Kind(
        "error",
        "Decoding the token ids of the prompt gives another text.",
        "Make `encode` and `decode` belong to the same tokenizer, and to the model.",
    ),
    "lossy-text": Kind(
        "warning",
        "The tokenizer does not keep some characters, so the model cannot see them.",
        "Use the tokenizer that belongs to the model. If it is that one, avoid tasks that need these characters.",
    ),
    "system-refused": Kind(
        "warning",
        "A conversation with a system message is refused.",
        "Give the loader a `chat_template` that writes the system message, for example before the first user message.",
    ),
    "turns-refused": Kind(
        "warning",
        "A conversation with an earlier answer is refused, so no second turn is possible.",
        "Give the loader a `chat_template` that writes messages of the assistant.",
    ),
    "consecutive-refused": Kind(
        "warning",
        "A conversation with two consecutive messages of a role is refused.",
        "Set `api: {merge_consecutive_roles: true}` for the model.",
    ),
    "empty-refused": Kind(
        "warning",
        "A conversation with an empty message is refused.",
        "Give the loader a `chat_template`, or a hook, that writes empty messages.",
    ),
    "no-tools": Kind(
        "skipped",
        "The chat template has no place for tools, so requests with tools are refused.",
        "If the model was trained on tool calls, give the loader a `chat_template` that writes the tools. Otherwise "
        "`api: {tools_without_template: true}` writes them as text.",
    ),
    "tools-refused": Kind(
        "warning",
        "The chat template speaks of tools, and a request with a tool is refused.",
        "Give the loader a `chat_template` that writes the tools.",
    ),
    "tool-results-refused": Kind(
        "warning",
        "The chat template takes tools, and refuses a tool call with its result.",
        "Give the loader a `chat_template` that writes tool calls and messages of the role `tool`.",
    ),
    "no-stop-tokens": Kind(
        "warning",
        "No token ends an answer, so every answer has max_tokens tokens.",
        "Set the tokenizer's `eos_token`, or let the loader return `stop_token_ids`.",
    ),
    "turn-end-not-stop": Kind(
        "warning",
        "The token with which the chat template ends an answer does not stop generation.",
        "Let the loader return it in `stop_token_ids`. If it is a text of several tokens, set "
        "`api: {default_params: {stop: [...]}}` for the model.",
    ),
    "tool-format-unknown": Kind(
        "warning",
        "The chat template takes tools, and the format of the model's tool calls was not recognized.",
        "Set `api: {tool_parser: ...}` for the model (docs/reference/parsers.md lists the parsers).",
    ),
    "tool-parser-differs": Kind(
        "warning",
        "`tool_parser` is another format than the one that the chat template shows.",
        "Remove `tool_parser`, if the chat template is the model's own.",
    ),
    "reasoning-parser-differs": Kind(
        "warning",
        "`reasoning_parser` looks for markers that neither the chat template nor the vocabulary has.",
        "Set the parser whose markers the model writes, or remove `reasoning_parser`.",
    ),
    "request-failed": Kind("error", "A request that every client sends fails.", "Repair what the finding names."),
    "empty-answer": Kind(
        "warning",
        "The most likely first token ends the answer, so the answer is empty.",
        "Compare the prompt with the one that the model was trained on.",
    ),
    "not-parity": Kind(
        "error",
        "The served tokens differ from those of the model's own `generate`.",
        "Set `engine: {kind: generate}` for the model, and report the difference.",
    ),
    "parity-rounding": Kind(
        "warning",
        "The served tokens differ from those of `generate` after a tie: two tokens are equally likely within the "
        "rounding of the dtype.",
        "Load the model in float32 if you need equal tokens.",
    ),
    "not-repeatable": Kind(
        "error",
        "The same greedy request gives other tokens when it is sent again.",
        "Remove the randomness or the state that the model or the `generate` hook keeps between calls.",
    ),
    "batch-dependent": Kind(
        "error",
        "The same greedy request gives other tokens beside other requests.",
        "Set `engine: {kind: generate}` for the model. If its `forward` mixes the rows of a batch, repair it.",
    ),
    "batch-rounding": Kind(
        "warning",
        "The same greedy request gives other tokens beside other requests after a tie: two tokens are equally likely "
        "within the rounding of the dtype.",
        "Set `engine: {deterministic: true}` for the model, or load it in float32.",
    ),
    "media-failed": Kind(
        "error",
        "The encoder takes images or recordings, and a request with one fails.",
        "Give the loader a `chat_template` or an `encode` hook that writes the place of the image or recording.",
    ),
    "check-failed": Kind("error", "A check itself failed.", "Report it with the output of `--traceback`."),
}
