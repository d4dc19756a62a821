// Asks for the API key. It stays in this tab's sessionStorage.

import { key } from "./api.js";
import { html, useState } from "./preact.js";

/** @param refused what the server said; `use` is called with the new key. */
export function KeyForm({ refused, use }) {
  const [text, setText] = useState("");
  const [problem, setProblem] = useState("");
  const onSubmit = (event) => {
    event.preventDefault();
    // A header has no other characters.
    const wrong = /[^\x21-\x7e]/.test(text.trim());
    setProblem(wrong ? "A key has only letters, digits and signs of ASCII, without spaces." : "");
    if (!wrong) use(text.trim());
  };
  return html`
    <form class="key" aria-label="API key" onSubmit=${onSubmit}>
      ${problem && html`<p role="alert">${problem}</p>`}
      ${!problem && refused && html`<p role="alert">${key.get() ? refused : "This server asks for an API key."}</p>`}
      <label for="api-key">API key</label>
      <input id="api-key" type="password" autocomplete="off" value=${text} onInput=${(event) => setText(event.target.value)} />
      <button class="primary">Use this key</button>
      ${key.get() && html`<button type="button" onClick=${() => use("")}>Forget it</button>`}
      <span class="note">It is kept in this tab until the tab is closed. An admin key opens the recorded requests, too.</span>
    </form>`;
}
