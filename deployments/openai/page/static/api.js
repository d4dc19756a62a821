// Requests to the server that this page comes from, with the key that the user gave.

import { parse, stringify } from "./exact.js";

const KEY = "troupe-key";
const { model, root } = document.documentElement.dataset;

/** The model of a page under /models/{id}; empty on the page of all models. */
export const onlyModel = model;

export class ApiError extends Error {
  constructor(status, message, { code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

const listeners = new Set();
/** Call a function each time the server refuses the key; returns a function that ends this. */
export function onRefused(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** The address of a route. `whole`: a route of the application, which is not served under a model's path. */
export function address(path, { whole = false } = {}) {
  return new URL((whole ? root : "") + path, document.baseURI).href;
}

/** Send a request. Throws ApiError if the server refuses it. */
export async function send(path, { body, signal, whole } = {}) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const response = await fetch(address(path, { whole }), {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : stringify(body),
    signal,
    credentials: "omit", // or the browser would ask for a password of its own
    cache: "no-store",
  }).catch((error) => {
    throw signal?.aborted ? error : new ApiError(0, "The server does not answer. Is it still running?");
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text();
  let error = {};
  try {
    error = parse(text).error ?? {};
  } catch {
    // A proxy's own page.
  }
  const message = error.message ?? `${response.status} ${response.statusText}`;
  if (response.status === 401) for (const listener of listeners) listener(message);
  return new ApiError(response.status, message, error);
}

/** The JSON of a route's answer. */
export async function ask(path, options) {
  return parse(await (await send(path, options)).text());
}

/** The data of the server-sent events of a response, as JSON, until [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield parse(data);
    }
  }
}
