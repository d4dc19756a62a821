// Two answers side by side, with the first token that differs: of two requests, or of two models on one prompt.

import { follow } from "./answer.js";
import { differentFields, firstDifference } from "./difference.js";
import { useSpelled } from "./inspection.js";
import { html } from "./preact.js";
import { Tokens } from "./tokens.js";

const SIDES = ["a", "b"];

/** @param sides {a, b}: answers; `put` is called with a side and an answer. `current` is the playground's own. */
export function Compare({ sides, put, current, models, body, kind }) {
  const a = useSide(sides.a);
  const b = useSide(sides.b);
  const byId = sides.a && sides.b && modelOf(sides.a) === modelOf(sides.b);
  const both = a.output && b.output;
  const outputs = both && firstDifference(a.output.tokens, b.output.tokens, { byId });
  const prompts = a.prompt && b.prompt && firstDifference(a.prompt.tokens, b.prompt.tokens, { byId });
  return html`
    <h2>Compare</h2>
    <p class="note">Choose two recorded requests under Requests, or send the playground's request to two models.</p>
    ${both && html`<${Verdict} a=${a} b=${b} prompts=${prompts} outputs=${outputs} byId=${byId} />`}
    ${sides.a && sides.b && html`<${Fields} a=${sides.a.body} b=${sides.b.body} />`}
    <div class="columns equal">${SIDES.map((side) => html`
      <section aria-label=${`Side ${side.toUpperCase()}`}>
        <${Source} side=${side} put=${put} current=${current} models=${models} body=${body} kind=${kind} answer=${sides[side]} />
        <${Side} side=${side} answer=${sides[side]} spelled=${side === "a" ? a : b} prompts=${prompts} outputs=${outputs} />
      </section>`)}</div>`;
}

const modelOf = (answer) => (answer.recorded ? answer.model : answer.body.model);
const NOTHING = { state: "sent", choices: [] };

function useSide(answer) {
  const given = answer ?? NOTHING;
  return useSpelled(given, given.choices[0], answer && modelOf(answer));
}

function Source({ side, put, current, models, body, kind, answer }) {
  const send = async (model) => {
    if (!model) return;
    try {
      await follow(kind, { ...body(), model }, { signal: new AbortController().signal, update: (changed) => put(side, changed) });
    } catch (error) {
      put(side, { ...NOTHING, state: "failed", body: {}, headers: {}, seconds: {}, error: error.message });
    }
  };
  const name = side.toUpperCase();
  return html`
    <div class="row">
      <h3>${name}</h3>
      <select aria-label=${`Send the playground's request to a model, as ${name}`} value="" onChange=${(event) => send(event.target.value)}>
        <option value="">Send the playground's request to …</option>
        ${models.map((model) => html`<option value=${model}>${model}</option>`)}</select>
      ${current?.choices.length > 0 && html`<button type="button" class="small" aria-label=${`Take the playground's answer as ${name}`}
        onClick=${() => put(side, current)}>Take its answer</button>`}
    </div>
    ${answer && html`<p class="note">${modelOf(answer)} · ${answer.id ?? answer.state} · ${answer.recorded ? "recorded" : "sent here"}</p>`}`;
}

function Side({ side, answer, spelled, prompts, outputs }) {
  if (!answer) return html`<p class="note empty">Nothing chosen.</p>`;
  const problem = answer.error ?? spelled.error;
  const logprobs = answer.choices[0]?.logprobs ?? [];
  const name = side.toUpperCase();
  return html`
    ${problem && html`<p class="error" role="alert">${problem}</p>`}
    ${spelled.output && html`
      <h4>generated</h4>
      <${Tokens} label=${`Generated tokens of ${name}`} tokens=${marked(spelled.output.tokens, outputs?.[side], logprobs)} />`}
    ${spelled.prompt && html`
      <h4>prompt</h4>
      <${Tokens} label=${`Prompt tokens of ${name}`} tokens=${marked(spelled.prompt.tokens, prompts?.[side], [])} />`}`;
}

const marked = (tokens, at, logprobs) =>
  tokens.map((token, i) => ({ ...token, logprob: logprobs[i]?.logprob, top: logprobs[i]?.top ?? [], differs: i === at }));

function Verdict({ a, b, prompts, outputs, byId }) {
  const how = byId ? "" : " The models differ: texts are compared, not ids.";
  return html`
    <p class="verdict" role="status">
      ${a.prompt && b.prompt && sentence("prompts", prompts, a.prompt, b.prompt)} ${sentence("answers", outputs, a.output, b.output)}${how}</p>`;
}

function sentence(what, difference, a, b) {
  if (!difference) return `The ${what} are equal (${a.tokens.length} tokens).`;
  const shown = (side, at) => (side.tokens[at] ? `${JSON.stringify(side.tokens[at].token)} (id ${side.tokens[at].id})` : "its end");
  return `The ${what} differ from token ${difference.a} of A, ${shown(a, difference.a)}, and token ${difference.b} of B, ${shown(b, difference.b)}.`;
}

function Fields({ a, b }) {
  const different = differentFields(a, b);
  if (!different.length) return html`<p class="note">The bodies of the two requests are equal.</p>`;
  return html`
    <details><summary>Fields of the requests that differ <span class="used">${different.map((each) => each.name).join(", ")}</span></summary>
      <div class="scroll"><table><thead><tr><th scope="col">field</th><th scope="col">A</th><th scope="col">B</th></tr></thead>
        <tbody>${different.map((each) => html`
          <tr><th scope="row"><code>${each.name}</code></th><td><code>${each.a ?? "not sent"}</code></td><td><code>${each.b ?? "not sent"}</code></td></tr>`)}
        </tbody></table></div></details>`;
}
