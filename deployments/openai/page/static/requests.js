// The calls that were recorded: a list with a filter, and each one as the playground shows its own.

import { stringify } from "./exact.js";
import { Inspection } from "./inspection.js";
import { bytes, count, seconds } from "./numbers.js";
import { html, useEffect, useRef, useState } from "./preact.js";
import { list, read } from "./recorded.js";

const LARGE = 4 * 2 ** 20;

/** @param repeat called with a recorded answer to send again; `compare` with a side and a recorded answer. */
export function Requests({ models, repeat, compare }) {
  const [filter, setFilter] = useState({ model: "", text: "" });
  const [calls, setCalls] = useState({ data: null, next: null });
  const [open, setOpen] = useState(null);
  const [error, setError] = useState("");
  const newest = useRef(0);

  const load = async (given, after) => {
    setError("");
    const own = (newest.current += 1);
    try {
      const found = await list({ ...given, after });
      if (own !== newest.current) return;
      setCalls((before) => ({ data: [...(after ? before.data : []), ...found.data], next: found.next }));
    } catch (problem) {
      setCalls({ data: null, next: null });
      setError(problem.message);
    }
  };
  useEffect(() => void load(filter), []);
  const show = async (call) => {
    if (call.bytes > LARGE && !confirm(`This call has ${bytes(call.bytes)}. Read it?`)) return;
    setError("");
    try {
      setOpen({ call, answer: await read(call.record) });
    } catch (problem) {
      setError(problem.message);
    }
  };

  return html`
    <h2>Recorded requests</h2>
    <${Filter} filter=${filter} models=${models} change=${setFilter} search=${() => load(filter)} />
    ${error && html`<p class="warning" role="status">${error}</p>`}
    ${calls.data && html`<${Calls} calls=${calls.data} open=${open?.call.record} show=${show} />`}
    ${calls.data?.length === 0 && !calls.next && html`<p class="note empty">No recorded call matches.</p>`}
    ${calls.next && html`<button type="button" onClick=${() => load(filter, calls.next)}>Older requests</button>`}
    ${open && html`<${Call} answer=${open.answer} repeat=${repeat} compare=${compare} />`}`;
}

function Filter({ filter, models, change, search }) {
  const onSubmit = (event) => {
    event.preventDefault();
    search();
  };
  return html`
    <form class="row filter" aria-label="Filter" onSubmit=${onSubmit}>
      <label for="filter-model">model</label>
      <select id="filter-model" value=${filter.model} onChange=${(event) => change({ ...filter, model: event.target.value })}>
        <option value="">all</option>${models.map((model) => html`<option value=${model}>${model}</option>`)}</select>
      <label for="filter-text">contains</label>
      <input id="filter-text" value=${filter.text} onInput=${(event) => change({ ...filter, text: event.target.value })} />
      <button>Search</button>
    </form>`;
}

const NUMBERS = ["prompt", "generated", "total"];

function Calls({ calls, open, show }) {
  const heads = ["time", "model", "route", "asked", "answered", "end", "prompt", "generated", "total"];
  return html`
    <div class="scroll"><table class="calls">
      <thead><tr>${heads.map((head) => html`<th scope="col" class=${NUMBERS.includes(head) ? "number" : null}>${head}</th>`)}</tr></thead>
      <tbody>${calls.map((call) => html`
        <tr aria-selected=${call.record === open} data-record=${call.record}>
          <th scope="row"><button type="button" class="link" onClick=${() => show(call)}>${call.time.replace("T", " ").replace("+00:00", "")}</button></th>
          <td>${call.model}</td><td>${call.path.replace(/^\/v1/, "")}</td>
          <td class="clip">${call.asked ?? `(${bytes(call.bytes)})`}</td><td class="clip">${call.text}</td>
          <td>${call.error ? html`<span class="state failed">${call.error.code}</span>` : endOf(call)}</td>
          <td class="number">${count(call.usage?.prompt_tokens)}</td><td class="number">${count(call.usage?.completion_tokens)}</td>
          <td class="number">${seconds(call.seconds.finished)}</td>
        </tr>`)}</tbody>
    </table></div>`;
}

const endOf = (call) => [...new Set(call.finish_reasons ?? [])].map((reason) => reason ?? "given up").join(", ") || "–";

function Call({ answer, repeat, compare }) {
  return html`
    <div class="answer" role="region" aria-label="Recorded request">
      <div class="row">
        <h2>${answer.model} <span class="note">${answer.path}</span></h2>
        ${answer.kind && html`<button type="button" onClick=${() => repeat(answer)}>Open in the playground</button>`}
        <button type="button" onClick=${() => compare("a", answer)}>Compare as A</button>
        <button type="button" onClick=${() => compare("b", answer)}>Compare as B</button>
      </div>
      <${Inspection} answer=${answer} model=${answer.model} />
      <section><details><summary>Request as it was sent</summary><pre class="raw">${stringify(answer.body, 2)}</pre></details></section>
    </div>`;
}
