// A request, sent as it is written, and beside it what came of it.

import { follow, pathOf, render } from "./answer.js";
import { Conversation } from "./conversation.js";
import { bodyOf, continued, plainBodyOf } from "./draft.js";
import { fieldGroups } from "./fields.js";
import { Inspection } from "./inspection.js";
import { html, useMemo, useRef, useState } from "./preact.js";
import { RenderedPrompt } from "./rendered_prompt.js";
import { RequestFields } from "./request_fields.js";
import { Snippets } from "./snippets.js";

export function Playground({ draft, setDraft, models, description, answer, setAnswer }) {
  const [problem, setProblem] = useState("");
  const [rendered, setRendered] = useState(null);
  const running = useRef(null);
  const groups = useMemo(() => description && fieldGroups(description, `/${pathOf(draft.kind)}`), [description, draft.kind]);
  const change = (part) => setDraft({ ...draft, ...part });
  const busy = answer?.state === "sent";

  const attempt = async (action) => {
    setProblem("");
    try {
      await action(bodyOf(draft, groups));
    } catch (error) {
      setProblem(error.message);
    }
  };
  const sendIt = () => attempt(async (body) => {
    running.current?.abort();
    running.current = new AbortController();
    setRendered(null);
    const { signal } = running.current;
    setAnswer({ kind: draft.kind, body, choices: [], headers: {}, seconds: {}, state: "sent" });
    const update = (changed) => running.current?.signal === signal && setAnswer(changed);
    await follow(draft.kind, body, { signal, update, plain: plainBodyOf(draft, groups) });
  });
  const showPrompt = () => attempt(async (body) => setRendered(await render(draft.kind, body)));
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && groups) {
      event.preventDefault();
      sendIt();
    }
  };

  return html`
    <div class="columns">
      <form class="request" aria-label="Request" onSubmit=${(event) => event.preventDefault()} onKeyDown=${onKeyDown}>
        <${Head} draft=${draft} change=${change} models=${models} />
        ${draft.kind === "chat" ? html`
          <${Conversation} messages=${draft.messages} change=${(messages) => change({ messages })} />
          <details class="fields"><summary>Tools${draft.tools.trim() && html` <span class="used">set</span>`}</summary>
            <textarea class="code" aria-label="Tools as JSON" rows="6" spellcheck=${false} value=${draft.tools}
              placeholder='[{"type": "function", "function": {"name": …}}]'
              onInput=${(event) => change({ tools: event.target.value })}></textarea></details>` : html`
          <label for="prompt">Prompt</label>
          <textarea id="prompt" rows="6" value=${draft.prompt} onInput=${(event) => change({ prompt: event.target.value })}></textarea>
          <p class="hint">A JSON list is sent as it is: several prompts, or token ids.</p>`}
        <div class="actions">
          <button type="button" class="primary" disabled=${!groups} onClick=${sendIt} aria-keyshortcuts="Control+Enter">Send</button>
          <button type="button" disabled=${!busy} onClick=${() => running.current?.abort()}>Stop</button>
          <button type="button" disabled=${!groups} onClick=${showPrompt}>Show prompt</button>
          <span class="note">Ctrl+Enter sends</span>
        </div>
        ${problem && html`<p class="error" role="alert">${problem}</p>`}
        ${groups ? html`<${RequestFields} groups=${groups} values=${draft.fields}
          change=${(name, text) => change({ fields: { ...draft.fields, [name]: text } })} />
        <details class="fields"><summary>Further fields${draft.further.trim() && html` <span class="used">set</span>`}</summary>
          <textarea class="code" aria-label="Further fields as JSON" rows="3" spellcheck=${false} value=${draft.further}
            placeholder='{"user": …}' onInput=${(event) => change({ further: event.target.value })}></textarea></details>` : html`<p class="note">Reading the fields of this route …</p>`}
        ${groups && html`<${Snippets} kind=${draft.kind} body=${() => bodyOf(draft, groups)} />`}
      </form>
      <div class="answer" role="region" aria-label="Answer" aria-busy=${busy}>
        ${rendered && html`<${RenderedPrompt} prompts=${rendered} model=${draft.model} />`}
        ${answer ? html`<${Inspection} answer=${answer} model=${answer.body.model} />` : !rendered && html`
          <p class="note empty">The answer appears here: what was sent and what came back, token by token.</p>`}
        ${answer && !busy && answer.kind === "chat" && answer.choices[0] && draft.kind === "chat" && html`
          <button type="button" onClick=${() => change({ messages: continued(answer.body.messages, answer.choices[0]) })}>Continue the conversation</button>`}
      </div>
    </div>`;
}

function Head({ draft, change, models }) {
  return html`
    <div class="row head">
      <div class="segments" role="group" aria-label="Kind of request">
        ${["chat", "completion"].map((kind) => html`
          <button type="button" aria-pressed=${draft.kind === kind} onClick=${() => change({ kind })}>${kind}</button>`)}
      </div>
      <span class="inline"><label for="model">model</label>
        <select id="model" value=${draft.model} onChange=${(event) => change({ model: event.target.value })}>
          ${models.map((model) => html`<option value=${model}>${model}</option>`)}
        </select></span>
      <span class="space"></span>
      <label class="inline"><input type="checkbox" checked=${draft.stream}
        onChange=${(event) => change({ stream: event.target.checked })} /> stream</label>
      <label class="inline" title="Sends logprobs, top_logprobs and return_token_ids">
        <input type="checkbox" checked=${draft.inspect}
          onChange=${(event) => change({ inspect: event.target.checked })} /> inspect tokens</label>
    </div>`;
}
