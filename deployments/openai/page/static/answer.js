// One answer of the server, as it comes: texts, tokens, log-probabilities, counts, headers and times.

import { ask, events, send } from "./api.js";
import { parse } from "./exact.js";

const PATHS = { chat: "v1/chat/completions", completion: "v1/completions" };
export const pathOf = (kind) => PATHS[kind];

/**
 * Send a request and follow its answer. `update` gets the answer each time it has grown, and at the end.
 * `plain` is sent in its place if the model gives no log-probabilities; null if the user asks for them.
 */
export async function follow(kind, body, { signal, update, plain = null }) {
  const answer = { kind, body, choices: [], usage: null, seconds: {}, headers: {}, prompt: null, state: "sent" };
  const begun = performance.now();
  const stamp = (name) => (answer.seconds[name] ??= (performance.now() - begun) / 1000);
  try {
    const response = await send(PATHS[kind], { body, signal }).catch((error) => {
      if (!plain || !["logprobs", "top_logprobs"].includes(error.param)) throw error;
      answer.body = plain;
      return send(PATHS[kind], { body: plain, signal });
    });
    readHeaders(answer, response.headers);
    if (body.stream) {
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        if (addEvent(answer, event)) stamp("first");
        update({ ...answer });
      }
    } else {
      addEvent(answer, parse(await response.text()));
    }
    answer.state = "complete";
  } catch (error) {
    answer.state = signal.aborted ? "stopped" : "failed";
    answer.error = signal.aborted ? null : error.message;
  }
  stamp("total");
  update({ ...answer });
  return answer;
}

function readHeaders(answer, headers) {
  answer.headers = {
    requestId: headers.get("x-request-id") ?? "",
    sampling: parse(headers.get("x-troupe-sampling") ?? "{}"),
    ignored: (headers.get("x-troupe-ignored") ?? "").split(",").filter(Boolean).map(decodeURIComponent),
  };
}

/** Add a chunk, or a whole answer; says whether it has text or tokens. */
function addEvent(answer, event) {
  answer.id = event.id;
  answer.model = event.model;
  answer.usage = event.usage ?? answer.usage;
  for (const name of ["prompt_token_ids", "prompt_text", "prompt_logprobs"]) {
    if (event[name] !== undefined) answer[name] = event[name];
  }
  return event.choices.map((choice) => addChoice(answer, choice)).some(Boolean);
}

function addChoice(answer, given) {
  const fresh = { index: given.index, content: "", reasoning: "", calls: [], token_ids: [], logprobs: [], parts: [] };
  const choice = (answer.choices[given.index] ??= fresh);
  const said = given.delta ?? given.message ?? { content: given.text };
  const grown = addText(choice, said);
  if (given.token_ids) choice.token_ids.push(...given.token_ids);
  choice.logprobs.push(...readLogprobs(given.logprobs));
  for (const name of ["prompt_token_ids", "prompt_logprobs"]) {
    if (given[name] !== undefined) choice[name] = given[name];
  }
  choice.finish_reason = given.finish_reason ?? choice.finish_reason;
  choice.stop_reason = given.stop_reason ?? choice.stop_reason;
  return grown || Boolean(given.token_ids?.length);
}

function addText(choice, said) {
  choice.reasoning += said.reasoning_content ?? "";
  choice.content += said.content ?? "";
  choice.calls.push(...(said.tool_calls ?? []).map((call) => ({ id: call.id, ...call.function })));
  return Boolean(said.reasoning_content || said.content || said.tool_calls);
}

/** Log-probabilities of chats and of completions in one shape: [{token, logprob, top: [{token, logprob}]}]. */
function readLogprobs(given) {
  if (!given) return [];
  if (given.content) {
    return given.content.map(({ token, logprob, top_logprobs: top }) => ({ token, logprob, top }));
  }
  return given.tokens.map((token, i) => ({
    token,
    logprob: given.token_logprobs[i],
    top: Object.entries(given.top_logprobs[i] ?? {}).map(([name, logprob]) => ({ token: name, logprob })),
  }));
}

/** The prompt that a request would give: {text, token_ids}, one for each prompt. */
export async function render(kind, body) {
  const answer = await ask(`${PATHS[kind]}/render`, { body: withoutStream(body) });
  return (answer.data ?? [answer]).map(({ prompt, token_ids }) => ({ text: prompt, token_ids }));
}

export function withoutStream({ stream, stream_options, ...body }) {
  return body;
}

/** Text and pieces of token ids: {text, tokens: [{id, token, bytes}]}. */
export async function spell(model, ids) {
  if (!ids.length) return { text: "", tokens: [] };
  const { prompt, pieces } = await ask("v1/detokenize", { body: { model, tokens: ids, return_pieces: true } });
  return { text: prompt, tokens: pieces.map((piece, i) => ({ id: ids[i], ...piece })) };
}
