// The page: its views, its key, its theme.

import { ask, key, onlyModel, onRefused } from "./api.js";
import { pathOf } from "./answer.js";
import { Compare } from "./compare.js";
import { bodyOf, draftOf, emptyDraft } from "./draft.js";
import { fieldGroups } from "./fields.js";
import { Models } from "./models.js";
import { Playground } from "./playground.js";
import { html, render, useEffect, useState } from "./preact.js";
import { KeyForm } from "./key_form.js";
import { Requests } from "./requests.js";
import { ThemeSwitch } from "./theme.js";

const VIEWS = { models: "Models", playground: "Playground", requests: "Requests", compare: "Compare" };

function App() {
  const [view, setView] = useState(viewOfAddress);
  const [server, setServer] = useState({ models: [], aliases: {}, description: null });
  const [refused, setRefused] = useState("");
  const [asking, setAsking] = useState(false);
  const [draft, setDraft] = useState(emptyDraft(onlyModel));
  const [answer, setAnswer] = useState(null);
  const [sides, setSides] = useState({ a: null, b: null });

  useEffect(() => onRefused(setRefused), []);
  useEffect(() => {
    const follow = () => setView(viewOfAddress());
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }, []);
  const read = async () => {
    try {
      const found = await readServer();
      setServer(found);
      setDraft((before) => (before.model ? before : { ...before, model: found.models[0]?.id ?? "" }));
    } catch (error) {
      if (error.status !== 401) setServer((before) => ({ ...before, error: error.message }));
    }
  };
  useEffect(() => void read(), []);
  useEffect(() => {
    // Models can come while the server runs.
    if (server.description) readModels().then((found) => setServer((before) => ({ ...before, ...found })), () => {});
  }, [view]);
  const put = (side, chosen) => setSides((before) => ({ ...before, [side]: chosen }));
  const repeat = (recorded) => {
    const groups = fieldGroups(server.description, `/${pathOf(recorded.kind)}`);
    setDraft(draftOf(recorded.kind, { ...recorded.body, model: recorded.model }, groups));
    location.hash = "playground";
  };
  const useKey = (given) => {
    key.set(given);
    setRefused("");
    setAsking(false);
    read();
  };

  return html`
    <header>
      <h1>Troupe${onlyModel && html` <code>${onlyModel}</code>`}</h1>
      <nav aria-label="Views">${Object.entries(VIEWS).map(([name, title]) => html`
        <button type="button" aria-current=${view === name ? "page" : null} onClick=${() => (location.hash = name)}>${title}</button>`)}</nav>
      <span class="space"></span>
      <a href=${`${document.documentElement.dataset.root}docs`}>API reference</a>
      <button type="button" class="small" onClick=${() => setAsking(!asking)}>${key.get() ? "Change key" : "Set key"}</button>
      <${ThemeSwitch} />
    </header>
    ${(refused || asking) && html`<${KeyForm} refused=${refused} use=${useKey} />`}
    ${server.error && html`<p class="error" role="alert">The server cannot be read: ${server.error}</p>`}
    <main>
      ${view === "models" && html`<${Models} cards=${server.models} aliases=${server.aliases} />`}
      ${view === "playground" && html`<${Playground} draft=${draft} setDraft=${setDraft} models=${server.models.map((model) => model.id)}
        description=${server.description} answer=${answer} setAnswer=${setAnswer} />`}
      ${view === "requests" && html`<${Requests} models=${server.models.map((model) => model.id)} repeat=${repeat}
        compare=${(side, recorded) => (put(side, recorded), (location.hash = "compare"))} />`}
      ${view === "compare" && html`<${Compare} sides=${sides} put=${put} current=${answer} kind=${draft.kind}
        models=${server.models.map((model) => model.id)}
        body=${() => bodyOf(draft, fieldGroups(server.description, `/${pathOf(draft.kind)}`))} />`}
    </main>`;
}

const viewOfAddress = () => (Object.hasOwn(VIEWS, location.hash.slice(1)) ? location.hash.slice(1) : "playground");

async function readServer() {
  const [models, description] = await Promise.all([readModels(), ask("openapi.json", { whole: true })]);
  return { ...models, description };
}

async function readModels() {
  const { data } = await ask("v1/models");
  const aliases = {};
  for (const { id, root } of data) if (id !== root) (aliases[root] ??= []).push(id);
  return { models: data.filter((each) => each.id === each.root), aliases };
}

render(html`<${App} />`, document.body);
