// A request as it is written on the page, and the body that it becomes.

import { parse, stringify } from "./exact.js";
import { readValue } from "./fields.js";

export const emptyDraft = (model) => ({
  kind: "chat", model, messages: [{ role: "user", content: "What is 27 + 15?" }], prompt: "The capital of France is",
  tools: "", fields: {}, further: "", inspect: true, stream: true,
});

const INSPECTED = {
  chat: { logprobs: true, top_logprobs: 5, return_token_ids: true },
  completion: { logprobs: 5, return_token_ids: true },
};

/** The body to send. Throws if a field cannot be read. */
export function bodyOf(draft, groups) {
  const body = { model: draft.model };
  if (draft.kind === "chat") {
    body.messages = draft.messages;
    if (draft.tools.trim()) body.tools = readValue({ name: "tools", kind: "json" }, draft.tools);
  } else {
    body.prompt = promptOf(draft.prompt);
  }
  for (const field of groups.flatMap((group) => group.fields)) {
    const value = readValue(field, draft.fields[field.name] ?? "");
    if (value !== undefined) body[field.name] = value;
  }
  if (draft.further.trim()) Object.assign(body, furtherOf(draft.further));
  if (draft.inspect) for (const [name, value] of Object.entries(INSPECTED[draft.kind])) body[name] ??= value;
  if (draft.stream) Object.assign(body, { stream: true, stream_options: { include_usage: true } });
  return body;
}

/** The body for a model without log-probabilities; null if the user asks for them. Throws as `bodyOf` does. */
export function plainBodyOf(draft, groups) {
  const body = bodyOf({ ...draft, inspect: false }, groups);
  return !draft.inspect || "logprobs" in body || "top_logprobs" in body ? null : { return_token_ids: true, ...body };
}

/** A text, or a JSON list of texts or token ids. */
function promptOf(text) {
  try {
    const list = parse(text);
    return Array.isArray(list) ? list : text;
  } catch {
    return text;
  }
}

function furtherOf(text) {
  const fields = readValue({ name: "Further fields", kind: "object" }, text);
  if (typeof fields !== "object" || fields === null || Array.isArray(fields)) throw new Error("Further fields are not a JSON object.");
  return fields;
}

/** A draft that sends an earlier body again. Fields that have no input of their own are further ones. */
export function draftOf(kind, { model, messages, prompt, tools, stream, stream_options: _, ...fields }, groups) {
  const known = new Set(groups.flatMap((group) => group.fields.map((field) => field.name)));
  const entries = Object.entries(fields).filter(([, value]) => value !== null);
  const written = entries.filter(([name]) => known.has(name)).map(([name, value]) => [name, typeof value === "string" ? value : stringify(value)]);
  const further = Object.fromEntries(entries.filter(([name]) => !known.has(name)));
  return {
    ...emptyDraft(model),
    kind,
    ...(messages && { messages }),
    ...(prompt !== undefined && { prompt: typeof prompt === "string" ? prompt : stringify(prompt) }),
    tools: tools ? stringify(tools, null, 2) : "",
    fields: Object.fromEntries(written),
    further: Object.keys(further).length ? stringify(further, 2) : "",
    stream: Boolean(stream),
    inspect: true,
  };
}

/** The conversation with an answer and the message that comes after it. */
export function continued(messages, choice) {
  const said = { role: "assistant", content: choice.content };
  if (choice.reasoning) said.reasoning_content = choice.reasoning;
  if (!choice.calls.length) return [...messages, said, { role: "user", content: "" }];
  said.tool_calls = choice.calls.map(({ id, name, arguments: given }) => ({
    id, type: "function", function: { name, arguments: given },
  }));
  return [...messages, said, ...choice.calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: "" }))];
}

