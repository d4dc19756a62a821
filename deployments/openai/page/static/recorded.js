// Recorded calls as answers, so that they are shown in the same way as those of the playground.

import { ask } from "./api.js";

export async function list({ model, text, after }) {
  const query = new URLSearchParams({ limit: "50", ...(model && { model }), ...(text && { q: text }), ...(after && { after }) });
  return ask(`v1/records?${query}`, { whole: true });
}

export async function read(record) {
  return answerOf(await ask(`v1/records/${encodeURIComponent(record)}`, { whole: true }));
}

/** A line of the record in the shape of `follow`'s answers. */
function answerOf(line) {
  const each = line.prompts.length ? Math.max(1, line.choices.length / line.prompts.length) : 1;
  return {
    recorded: true,
    kind: kindOf(line.path),
    path: line.path,
    body: line.request,
    model: line.model,
    id: line.id,
    state: line.error ? "failed" : line.usage ? "complete" : "given up",
    error: line.error && `${line.error.status} ${line.error.code}: ${line.error.message}`,
    headers: { requestId: line.request_id, sampling: samplingOf(line.sampling) },
    seconds: { first: line.seconds.first, total: line.seconds.finished },
    usage: line.usage && usageOf(line.usage),
    prompt_token_ids: line.prompts[0]?.token_ids ?? [],
    choices: line.choices.map((choice) => choiceOf(choice, line.prompts[Math.floor(choice.index / each)])),
  };
}

const kindOf = (path) => (/chat\/completions$/.test(path) ? "chat" : /completions$/.test(path) ? "completion" : null);

const samplingOf = (sampling) => Object.fromEntries(Object.entries(sampling).filter(([, value]) => value !== null));

const usageOf = ({ timings, ...usage }) => ({
  ...usage,
  ...timings,
  total_tokens: usage.prompt_tokens + usage.completion_tokens,
  prompt_tokens_details: { cached_tokens: usage.cached_tokens },
  ...(usage.reasoning_tokens && { completion_tokens_details: { reasoning_tokens: usage.reasoning_tokens } }),
});

function choiceOf(choice, prompt) {
  return {
    index: choice.index,
    content: choice.text,
    reasoning: "",
    calls: [],
    token_ids: choice.token_ids,
    prompt_token_ids: prompt?.token_ids,
    logprobs: (choice.logprobs ?? []).map((logprob) => ({ logprob, top: [] })),
    finish_reason: choice.finish_reason,
    stop_reason: choice.stop_reason,
  };
}
