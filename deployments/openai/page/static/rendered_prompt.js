// The prompts that a request would give, before anything is computed.

import { spell } from "./answer.js";
import { html, useEffect, useState } from "./preact.js";
import { Tokens } from "./tokens.js";

export function RenderedPrompt({ prompts, model }) {
  return html`${prompts.map((prompt, i) => html`<${OnePrompt} prompt=${prompt} model=${model} number=${i + 1} of=${prompts.length} />`)}`;
}

function OnePrompt({ prompt, model, number, of }) {
  const [spelled, setSpelled] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    let current = true;
    spell(model, prompt.token_ids).then((found) => current && setSpelled(found), (problem) => current && setError(problem.message));
    return () => (current = false);
  }, [prompt, model]);
  const title = of > 1 ? `Prompt ${number}` : "Prompt";
  return html`
    <section aria-label=${title}>
      <h3>${title}, not sent <span class="note">${prompt.token_ids.length} tokens</span></h3>
      ${error && html`<p class="error" role="alert">${error}</p>`}
      ${spelled && html`<${Tokens} label="Tokens of the prompt" tokens=${spelled.tokens} />`}
      ${prompt.text !== null && html`<details><summary>Text</summary><pre class="raw">${prompt.text}</pre></details>`}
    </section>`;
}
