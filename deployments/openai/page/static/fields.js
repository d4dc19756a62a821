// The request fields of a route, from the OpenAPI description, so that none is missing.

import { parse } from "./exact.js";

// Fields that the page has controls of their own for.
const ELSEWHERE = ["model", "messages", "prompt", "tools", "stream", "stream_options"];

const GROUPS = {
  Sampling: ["temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "n", "best_of"],
  Length: ["max_tokens", "max_completion_tokens", "min_tokens", "truncate_prompt_tokens"],
  "End of the text": ["stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"],
  Penalties: [
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids", "bad_words",
  ],
  "Constrained text": [
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
  ],
  "Tools and reasoning": ["tool_choice", "parallel_tool_calls", "include_reasoning", "reasoning_effort"],
  "Prompt and template": [
    "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "documents", "echo",
    "add_special_tokens",
  ],
  "Beam search": ["use_beam_search", "num_beams", "length_penalty", "early_stopping"],
  Reports: [
    "logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "return_token_ids", "return_prompt_text",
    "return_tokens_as_token_ids",
  ],
};

/** The fields of a route in groups: [{name, fields: [{name, kind, choices, hint, initial}]}]. */
export function fieldGroups(description, path) {
  const schemas = description.components.schemas;
  const body = description.paths[path].post.requestBody.content["application/json"].schema;
  const properties = resolve(body, schemas).properties;
  const left = new Set(Object.keys(properties).filter((name) => !ELSEWHERE.includes(name)));
  const take = (name) => left.delete(name) && readField(name, properties[name], schemas);
  const groups = Object.entries(GROUPS).map(([name, names]) => ({ name, fields: names.map(take).filter(Boolean) }));
  groups.push({ name: "Other", fields: [...left].map(take) });
  return groups.filter((group) => group.fields.length);
}

function readField(name, schema, schemas) {
  const options = alternatives(schema, schemas);
  const types = new Set(options.flatMap((option) => option.type ?? []));
  const choices = options.flatMap((option) => option.enum ?? (option.const === undefined ? [] : [option.const]));
  return {
    name,
    kind: kindOf(types, choices),
    choices,
    hint: [schema.description, limits(options)].filter(Boolean).join(" "),
    initial: initial(schema.default),
  };
}

function kindOf(types, choices) {
  if (types.has("boolean") && types.size === 1) return "boolean";
  if (types.has("array") || types.has("object") || types.size === 0) return "json";
  if (types.has("string") && !types.has("boolean")) return choices.length ? "choice" : "string";
  return types.has("boolean") ? "json" : "number";
}

function alternatives(schema, schemas) {
  const found = resolve(schema, schemas);
  const options = found.anyOf ?? found.oneOf ?? found.allOf;
  if (!options) return found.type === "null" ? [] : [found];
  return options.flatMap((option) => alternatives(option, schemas));
}

function resolve(schema, schemas) {
  return schema.$ref ? schemas[schema.$ref.split("/").pop()] : schema;
}

function limits(options) {
  const low = options.map((option) => option.minimum ?? option.exclusiveMinimum).find((limit) => limit !== undefined);
  const high = options.map((option) => option.maximum ?? option.exclusiveMaximum).find((limit) => limit !== undefined);
  if (low === undefined && high === undefined) return "";
  const unlimited = high === undefined || Number(high) >= 2 ** 31 - 1;
  if (unlimited) return low === undefined || Number(low) < -1 ? "" : `From ${low}.`;
  return `${low ?? "…"} to ${high}.`;
}

function initial(value) {
  const empty = value === undefined || value === null || (typeof value === "object" && !Object.keys(value).length);
  return empty ? "" : JSON.stringify(value);
}

/** The value of a field as the user wrote it; undefined if nothing was written. Throws if it cannot be read. */
export function readValue(field, text) {
  const trimmed = text.trim();
  if (!trimmed) return undefined;
  if (field.kind === "string" || field.kind === "choice") return text;
  try {
    return parse(trimmed);
  } catch {
    if (field.kind === "json" && !/^[[{"]/.test(trimmed)) return text;
    throw new Error(`${field.name} is not ${field.kind === "number" ? "a number" : "JSON"}: ${trimmed.slice(0, 40)}`);
  }
}
