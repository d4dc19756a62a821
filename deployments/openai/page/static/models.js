// Every model: where it is loaded, what it does now. The figures are those of /health?verbose.

import { ask, onlyModel } from "./api.js";
import { bytes, count } from "./numbers.js";
import { html, useEffect, useRef, useState } from "./preact.js";

const EVERY_MS = 2000;

export function Models({ cards, aliases }) {
  const { replicas, rates, error } = useStatus();
  return html`
    <h2>Models</h2>
    ${error && html`<p class="warning" role="status">${error}</p>`}
    <div class="scroll"><table class="models">
      <thead><tr>${COLUMNS.map(([name]) => html`<th scope="col">${name}</th>`)}</tr></thead>
      ${cards.map((card) => html`<${Model} card=${card} aliases=${aliases[card.id] ?? []} replicas=${replicas} rates=${rates} />`)}
    </table></div>
    ${replicas && html`<${Replicas} replicas=${replicas} />`}`;
}

/** The state of every replica, asked for as long as the page shows it. */
function useStatus() {
  const [status, setStatus] = useState({ replicas: null, rates: {} });
  const before = useRef({});
  useEffect(() => {
    let timer = null;
    let current = true;
    const look = async () => {
      if (!document.hidden) await askOnce();
      if (current) timer = setTimeout(look, EVERY_MS);
    };
    const askOnce = async () => {
      try {
        const { data } = await ask("health?verbose", { whole: true });
        if (current) setStatus({ replicas: data, rates: measured(data, before.current) });
      } catch (error) {
        const prefix = onlyModel ? "The state of the server is not reachable from a model's own path" : "The state cannot be read";
        if (current) setStatus({ replicas: null, rates: {}, error: `${prefix}: ${error.message}` });
      }
    };
    look();
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, []);
  return status;
}

/** Generated tokens per second since the last look, by replica and model. */
function measured(replicas, before) {
  const now = performance.now() / 1000;
  const rates = {};
  for (const replica of replicas) {
    for (const model of replica.models) {
      const name = `${nameOf(replica)} ${model.id}`;
      const last = before[name];
      if (last && model.generated_tokens >= last.tokens) rates[name] = (model.generated_tokens - last.tokens) / (now - last.at);
      before[name] = { tokens: model.generated_tokens, at: now };
    }
  }
  return rates;
}

const nameOf = (replica) => replica.replica ?? "local";

const COLUMNS = [
  ["model"], ["state"], ["where"], ["running"], ["waiting"], ["tokens/s"], ["generated"], ["weights"], ["cache"], ["prefixes"], ["context"],
];

function Model({ card, aliases, replicas, rates }) {
  const rows = replicas ? rowsOf(card.id, replicas, rates) : [{ state: "–", where: "–" }];
  return html`<tbody>${rows.map((row, i) => html`
    <tr data-model=${card.id}>
      ${i === 0 && html`<th scope="rowgroup" rowspan=${rows.length}><code>${card.id}</code>
        ${aliases.length > 0 && html`<div class="note">${aliases.join(", ")}</div>`}</th>`}
      <td><span class=${`state ${row.state.replace(" ", "-")}`}>${row.state}</span>
        ${row.reason && html`<div class="reason">${row.reason}</div>`}</td>
      <td>${row.where}</td>
      ${["sequences", "waiting", "rate", "generated", "weights", "cache", "prefixes"].map((name) => html`<td class="number" data-figure=${name}>${row[name] ?? "–"}</td>`)}
      <td class="number">${i === 0 ? count(card.max_model_len) : ""}</td>
    </tr>`)}</tbody>`;
}

function rowsOf(id, replicas, rates) {
  const rows = replicas.flatMap((replica) => {
    const where = `${nameOf(replica)} · ${replica.device}`;
    const model = replica.models.find((each) => each.id === id);
    if (model) return [{ state: "loaded", where, ...figures(model, rates[`${nameOf(replica)} ${id}`]) }];
    if (replica.loading.includes(id)) return [{ state: "loading", where }];
    if (replica.failed?.[id]) return [{ state: "failed", where, reason: replica.failed[id] }];
    return [];
  });
  return rows.length ? rows : [{ state: "not loaded", where: "–" }];
}

function figures(model, rate) {
  return {
    sequences: count(model.sequences),
    waiting: count(model.waiting),
    rate: rate === undefined ? "…" : rate.toFixed(1),
    generated: count(model.generated_tokens),
    weights: model.weight_bytes ? bytes(model.weight_bytes) : "–",
    cache: model.budget_bytes ? `${bytes(model.cache_bytes)} of ${bytes(model.budget_bytes)}` : bytes(model.cache_bytes),
    prefixes: `${bytes(model.prefix_bytes)} in ${count(model.prefix_entries)}`,
  };
}

const NUMBERS = ["pid", "waiting for a model", "loads", "failed loads", "evictions"];

function Replicas({ replicas }) {
  return html`
    <h2>Replicas</h2>
    <div class="scroll"><table>
      <thead><tr>${["replica", "device", "pid", "models", "waiting for a model", "loads", "failed loads", "evictions"].map((name) => html`
        <th scope="col" class=${NUMBERS.includes(name) ? "number" : null}>${name}</th>`)}</tr></thead>
      <tbody>${replicas.map((replica) => html`
        <tr><th scope="row"><code>${nameOf(replica)}</code>${replica.draining && html` <span class="state loading">draining</span>`}</th>
          <td>${replica.device}</td><td class="number">${replica.pid}</td>
          <td>${replica.models.map((model) => `${model.id} (${model.kind})`).join(", ") || "none"}</td>
          ${["waiting", "loads", "load_failures", "evictions"].map((name) => html`<td class="number">${replica[name]}</td>`)}
        </tr>`)}</tbody>
    </table></div>`;
}
