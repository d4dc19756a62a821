// A text token by token. The mouse or the arrow keys choose a token, and its details stand below.

import { percent, visible } from "./numbers.js";
import { html, useEffect, useMemo, useRef, useState } from "./preact.js";

const SHOWN_AT_FIRST = 3000;
/** Probabilities at which the shade changes. */
export const LIMITS = [0.9, 0.6, 0.3, 0.1, 0.02];
let lists = 0;

/**
 * @param tokens [{id, token, bytes, kind, cached, differs, logprob, top: [{token, logprob}]}]
 * @param start the position of the first of them.
 */
export function Tokens({ label, tokens, start = 0 }) {
  const list = useRef();
  const name = useMemo(() => `tokens-${lists++}`, []);
  const [active, setActive] = useState(null);
  const [all, setAll] = useState(false);
  const shown = all ? tokens : tokens.slice(0, SHOWN_AT_FIRST);
  const items = useMemo(() => shown.map((token, i) => item(token, i, name)), [tokens, all]);

  useEffect(() => setActive(null), [tokens]);
  useEffect(() => {
    const chosen = active === null ? null : list.current?.children[active];
    chosen?.setAttribute("aria-selected", "true");
    return () => chosen?.setAttribute("aria-selected", "false");
  }, [active, tokens]);

  const onKeyDown = (event) => {
    const at = active ?? -1;
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: 1e9 };
    if (!(event.key in next)) return;
    event.preventDefault();
    const target = Math.max(0, Math.min(shown.length - 1, next[event.key]));
    setActive(target);
    list.current.children[target]?.scrollIntoView({ block: "nearest" });
  };
  const onMouseOver = (event) => event.target.dataset.at && setActive(Number(event.target.dataset.at));

  if (!tokens.length) return html`<p class="note">No tokens.</p>`;
  return html`
    <div class="tokens" ref=${list} role="listbox" tabindex="0" aria-label=${label}
      aria-activedescendant=${active === null ? null : `${name}-${active}`}
      onKeyDown=${onKeyDown} onMouseOver=${onMouseOver} onFocus=${() => active === null && setActive(0)}>${items}</div>
    ${shown.length < tokens.length && html`<button type="button" class="small" onClick=${() => setAll(true)}>
      Show all ${tokens.length} tokens</button>`}
    <${Detail} token=${tokens[active]} position=${start + (active ?? 0)} label=${label} />`;
}

function item(token, at, name) {
  const classes = ["token", token.kind && `is-${token.kind}`, token.cached && "cached", token.differs && "differs"];
  if (token.logprob !== undefined && token.logprob !== null) classes.push(`p${shade(token.logprob)}`);
  return html`<span class=${classes.filter(Boolean).join(" ")} role="option" id=${`${name}-${at}`} data-at=${at}
    aria-selected="false" aria-label=${spoken(token)}>${visible(token)}</span>`;
}

/** From 1, certain, to 6, unlikely. */
function shade(logprob) {
  const share = Math.exp(logprob);
  return LIMITS.findIndex((limit) => share >= limit) + 1 || LIMITS.length + 1;
}

const spoken = (token) => {
  const text = JSON.stringify(token.token);
  return token.logprob === undefined || token.logprob === null ? text : `${text}, ${percent(token.logprob)}`;
};

function Detail({ token, position, label }) {
  if (!token) return html`<p class="note hint">Point at a token, or press the arrow keys, for its details.</p>`;
  const facts = [`token ${position}`, `id ${token.id}`];
  if (token.kind) facts.push(`read as ${token.kind}`);
  if (token.cached) facts.push("in the prefix cache");
  const scored = token.logprob !== undefined && token.logprob !== null;
  return html`
    <div class="token-detail" aria-live="polite" aria-label=${`${label}: chosen token`}>
      <p><code class="piece">${JSON.stringify(token.token)}</code> ${facts.join(" · ")}</p>
      ${scored && html`<${Alternatives} token=${token} />`}
    </div>`;
}

function Alternatives({ token }) {
  const named = token.top.some((each) => each.token === token.token && each.logprob === token.logprob);
  const rows = named ? token.top : [{ token: token.token, logprob: token.logprob }, ...token.top];
  return html`
    <table class="alternatives">
      <thead><tr><th scope="col">token</th><th scope="col">probability</th><th scope="col">logprob</th></tr></thead>
      <tbody>${rows.map((each) => html`
        <tr class=${each.token === token.token ? "chosen" : ""}>
          <td><code>${JSON.stringify(each.token)}</code></td>
          <td><meter min="0" max="1" value=${Math.exp(each.logprob)} aria-label="probability"></meter>
            ${percent(each.logprob)}</td>
          <td class="number">${each.logprob}</td>
        </tr>`)}</tbody>
    </table>`;
}
