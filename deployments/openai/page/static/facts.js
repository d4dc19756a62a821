// The figures of an answer. Those of the API are shown as it sent them.

import { count, seconds } from "./numbers.js";
import { stringify } from "./exact.js";
import { html } from "./preact.js";

export function Facts({ answer, choice }) {
  const usage = answer.usage ?? {};
  const sampling = answer.headers.sampling ?? {};
  return html`
    <section aria-labelledby="facts">
      <h3 id="facts">Figures</h3>
      <dl class="facts">
        <${Fact} name="finish_reason" value=${choice?.finish_reason ?? (answer.state === "sent" ? "…" : answer.state)} />
        ${(choice?.stop_reason ?? null) !== null && html`<${Fact} name="stop_reason" value=${stringify(choice.stop_reason)} />`}
        <${Fact} name="prompt_tokens" value=${count(usage.prompt_tokens)} />
        <${Fact} name="cached_tokens" value=${count(usage.prompt_tokens_details?.cached_tokens)} />
        <${Fact} name="completion_tokens" value=${count(usage.completion_tokens)} />
        ${usage.completion_tokens_details && html`
          <${Fact} name="reasoning_tokens" value=${count(usage.completion_tokens_details.reasoning_tokens)} />`}
        <${Fact} name="total_tokens" value=${count(usage.total_tokens)} />
        <${Fact} name="seed" value=${sampling.seed === undefined ? "none (random)" : String(sampling.seed)} />
        <${Times} answer=${answer} usage=${usage} />
        <${Fact} name="id" value=${answer.id ?? "–"} />
        <${Fact} name="x-request-id" value=${answer.headers.requestId || "–"} />
      </dl>
      ${answer.headers.ignored?.length > 0 && html`
        <p class="warning">Ignored by the server (x-troupe-ignored): <code>${answer.headers.ignored.join(", ")}</code></p>`}
      <details><summary>Sampling that was used${" "}
        <span class="note">${answer.recorded ? "in the record" : "x-troupe-sampling"}</span></summary>
        <dl class="facts">${Object.entries(sampling).map(([name, value]) => html`
          <${Fact} name=${name} value=${stringify(value)} />`)}</dl></details>
    </section>`;
}

/** Times that the server reports, and those that were measured here or written into the record. */
function Times({ answer, usage }) {
  const { first, total } = answer.seconds;
  const where = answer.recorded ? "in the record" : "in this browser";
  const tokens = usage.completion_tokens ?? 0;
  const rate = tokens && total ? `${(tokens / total).toFixed(1)}` : "–";
  return html`
    ${["time_to_first_token", "total_time", "tokens_per_second"].filter((name) => usage[name] !== undefined).map((name) => html`
      <${Fact} name=${name} value=${count(usage[name])} />`)}
    ${first !== undefined && html`<${Fact} name="first token" value=${seconds(first)} where=${where} />`}
    <${Fact} name="total" value=${seconds(total)} where=${where} />
    <${Fact} name="tokens/s" value=${rate} where=${where} />`;
}

function Fact({ name, value, where }) {
  return html`<div data-fact=${name} class=${String(value).length > 22 ? "wide" : null}><dt>${name}${where && html` <span class="note">${where}</span>`}</dt><dd>${value}</dd></div>`;
}
