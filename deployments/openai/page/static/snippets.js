// A request as a command and as a program, ready to be copied.

import { address, key } from "./api.js";
import { pathOf } from "./answer.js";
import { stringify } from "./exact.js";
import { html, useRef, useState } from "./preact.js";

// The arguments of the openai client's methods; every other field goes into extra_body.
const SHARED = [
  "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty", "seed", "stop",
  "stream", "stream_options", "temperature", "top_p", "user",
];
const ARGUMENTS = {
  chat: [
    ...SHARED, "messages", "max_completion_tokens", "metadata", "parallel_tool_calls", "prompt_cache_key",
    "reasoning_effort", "response_format", "service_tier", "store", "tool_choice", "tools", "top_logprobs",
  ],
  completion: [...SHARED, "prompt", "best_of", "echo", "suffix"],
};
const METHODS = { chat: "chat.completions", completion: "completions" };

export function asCurl(kind, body) {
  const quoted = stringify(body, 2).replaceAll("'", `'\\''`);
  const authorization = key.get() ? ` \\\n  -H "Authorization: Bearer $TROUPE_API_KEY"` : "";
  return `curl ${address(pathOf(kind))}${authorization} \\\n  -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
}

export function asPython(kind, body) {
  const known = Object.entries(body).filter(([name]) => ARGUMENTS[kind].includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !ARGUMENTS[kind].includes(name)));
  const given = known.map(([name, value]) => `    ${name}=${python(value)},`);
  if (Object.keys(extra).length) given.push(`    extra_body=${python(extra)},`);
  const secret = key.get() ? 'os.environ["TROUPE_API_KEY"]' : '"none"';
  const head = `${key.get() ? "import os\n\n" : ""}from openai import OpenAI\n\n`;
  const client = `client = OpenAI(base_url="${address("v1")}", api_key=${secret})\n`;
  const tail = body.stream ? "for chunk in answer:\n    print(chunk)" : "print(answer)";
  return `${head}${client}answer = client.${METHODS[kind]}.create(\n${given.join("\n")}\n)\n${tail}`;
}

/** A JSON value as Python writes it. */
function python(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each)}`).join(", ")}}`;
  }
  return stringify(value);
}

/** @param body a function that gives the request's body. */
export function Snippets({ kind, body }) {
  return html`
    <${Snippet} label="curl" text=${() => asCurl(kind, body())} />
    <${Snippet} label="Python" text=${() => asPython(kind, body())} />`;
}

function Snippet({ label, text }) {
  const [shown, setShown] = useState("");
  const [copied, setCopied] = useState(false);
  const code = useRef();
  const onToggle = (event) => event.target.open && setShown(attempt(text));
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(shown);
      setCopied(true);
    } catch {
      getSelection().selectAllChildren(code.current); // a page without https has no clipboard
    }
  };
  return html`
    <details class="snippet" onToggle=${onToggle}>
      <summary>Copy as ${label}</summary>
      <button type="button" class="small" onClick=${copy}>${copied ? "Copied" : "Copy"}</button>
      <pre ref=${code} tabindex="0" aria-label=${`The request as ${label}`}>${shown}</pre>
    </details>`;
}

function attempt(text) {
  try {
    return text();
  } catch (error) {
    return error.message;
  }
}
