// What a request really sent and got: its prompt and its answer token by token, raw and as read, counts and times.

import { spell } from "./answer.js";
import { Facts } from "./facts.js";
import { html, useEffect, useState } from "./preact.js";
import { tokenKinds } from "./regions.js";
import { LIMITS, Tokens } from "./tokens.js";

/** @param answer see `follow`; `model` is the one that reads its tokens. */
export function Inspection({ answer, model }) {
  const [index, setIndex] = useState(0);
  const choices = answer.choices.filter(Boolean);
  const choice = choices[Math.min(index, choices.length - 1)];
  const spelled = useSpelled(answer, choice, model);
  return html`
    ${answer.error && html`<p class="error" role="alert">${answer.error}</p>`}
    ${choices.length > 1 && html`<${ChoiceTabs} choices=${choices} index=${index} choose=${setIndex} />`}
    ${choice && html`<${Read} choice=${choice} recorded=${answer.recorded} />`}
    <${Facts} answer=${answer} choice=${choice} />
    ${spelled.error && html`<p class="error" role="alert">${spelled.error}</p>`}
    ${spelled.output && html`<${Output} choice=${choice} spelled=${spelled.output} recorded=${answer.recorded} />`}
    ${spelled.prompt && html`<${Prompt} answer=${answer} choice=${choice} spelled=${spelled.prompt} />`}`;
}

function ChoiceTabs({ choices, index, choose }) {
  return html`<div class="segments" role="group" aria-label="Choices">${choices.map((choice, i) => html`
    <button type="button" aria-pressed=${i === index} onClick=${() => choose(i)}>choice ${choice.index}</button>`)}</div>`;
}

/** The prompt's and the answer's tokens with their texts, once the answer has ended. */
export function useSpelled(answer, choice, model) {
  const [spelled, setSpelled] = useState({});
  const ended = answer.state !== "sent";
  const of = `${answer.id} ${answer.state} ${choice?.index} ${model}`;
  useEffect(() => {
    let current = true;
    const ids = choice?.token_ids ?? [];
    const promptIds = choice?.prompt_token_ids ?? answer.prompt_token_ids ?? [];
    if (!ended || !(ids.length || promptIds.length)) return undefined;
    Promise.all([ids.length ? spell(model, ids) : null, promptIds.length ? spell(model, promptIds) : null])
      .then(([output, prompt]) => current && setSpelled({ of, output, prompt }))
      .catch((error) => current && setSpelled({ of, error: `The tokens cannot be shown: ${error.message}` }));
    return () => (current = false);
  }, [of]);
  return spelled.of === of ? spelled : {}; // not those of the answer before
}

function Read({ choice, recorded }) {
  const title = recorded ? "Text of the model" : "Answer as read";
  return html`
    <section class="read" aria-label=${title} aria-live="polite">
      <h3>${title}</h3>
      ${choice.reasoning && html`<div class="block is-reasoning"><h4>reasoning_content</h4><pre>${choice.reasoning}</pre></div>`}
      ${(choice.content || !choice.calls.length) && html`
        <div class="block is-content"><h4>${recorded ? "text, before it was read" : "content"}</h4><pre>${choice.content || "(empty)"}</pre></div>`}
      ${choice.calls.map((call) => html`
        <div class="block is-call"><h4>tool call ${call.id ?? ""}</h4><pre>${call.name}(${call.arguments})</pre></div>`)}
    </section>`;
}

function Output({ choice, spelled, recorded }) {
  const kinds = recorded ? [] : tokenKinds(spelled.tokens, choice);
  const tokens = spelled.tokens.map((token, i) => ({ ...token, ...(choice.logprobs[i] ?? {}), ...piece(token, kinds[i]) }));
  return html`
    <section aria-labelledby="output-tokens">
      <h3 id="output-tokens">Generated tokens <span class="note">${tokens.length}</span></h3>
      ${choice.logprobs.length ? html`<${Legend} kinds=${new Set(kinds)} />` : html`
        <p class="note">No log-probabilities: the request did not ask for them (logprobs, top_logprobs), or the model gives none.</p>`}
      <${Tokens} label="Generated tokens" tokens=${tokens} />
      <details><summary>Raw text, special tokens included</summary><pre class="raw">${spelled.text}</pre></details>
    </section>`;
}

// The text of a token is that of its id: log-probabilities may name it as token_id:N.
const piece = (token, kind) => ({ token: token.token, kind: kind === "content" ? undefined : kind });

function Legend({ kinds }) {
  return html`
    <p class="legend">
      ${LIMITS.map((limit, i) => html`<span class=${`token p${i + 1}`}>≥ ${limit * 100}%</span>`)}
      <span class=${`token p${LIMITS.length + 1}`}>less</span>
      ${["reasoning", "call", "markup"].filter((kind) => kinds.has(kind)).map((kind) => html`
        <span class=${`token is-${kind}`}>${kind}</span>`)}
    </p>`;
}

function Prompt({ answer, choice, spelled }) {
  const cached = answer.usage?.prompt_tokens_details?.cached_tokens ?? 0;
  const scores = choice?.prompt_logprobs ?? answer.prompt_logprobs;
  const several = answer.choices.some((other) => other && other.prompt_token_ids?.join() !== choice?.prompt_token_ids?.join());
  const tokens = spelled.tokens.map((token, i) => ({
    ...token, cached: i < cached && !several, ...promptScore(scores?.[i], token.id),
  }));
  return html`
    <section aria-labelledby="prompt-tokens">
      <h3 id="prompt-tokens">Prompt as the model got it${" "}
        <span class="note">${tokens.length} tokens, ${cached} from the prefix cache${several && " in all prompts"}</span></h3>
      <${Tokens} label="Prompt tokens" tokens=${tokens} />
    </section>`;
}

function promptScore(score, id) {
  if (!score?.[id]) return {};
  const top = Object.values(score).map(({ decoded_token: token, logprob }) => ({ token, logprob }));
  return { logprob: score[id].logprob, top };
}
