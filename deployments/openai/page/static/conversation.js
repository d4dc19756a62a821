// The messages of a chat: text, images by file, drag or paste, and the whole list as JSON.

import { parse, stringify } from "./exact.js";
import { html, useRef, useState } from "./preact.js";

const ROLES = ["system", "user", "assistant", "tool"];

const partsOf = (content) => (typeof content === "string" ? [{ type: "text", text: content }] : content ?? []);
const textOf = (content) => partsOf(content).filter((part) => part.type === "text").map((part) => part.text).join("\n");
const othersOf = (content) => partsOf(content).filter((part) => part.type !== "text");
const compose = (text, others) => (others.length ? [...(text ? [{ type: "text", text }] : []), ...others] : text);

/** @param change called with the new list of messages. */
export function Conversation({ messages, change }) {
  const replace = (index, message) => change(messages.map((each, i) => (i === index ? message : each)));
  const last = messages[messages.length - 1];
  const next = last?.role === "user" ? "assistant" : "user";
  return html`
    <fieldset class="conversation">
      <legend>Messages</legend>
      ${messages.map((message, i) => html`
        <${Message} message=${message} number=${i + 1} change=${(changed) => replace(i, changed)}
          remove=${messages.length > 1 && (() => change(messages.filter((_, other) => other !== i)))} />`)}
      <div class="row">
        <button type="button" onClick=${() => change([...messages, { role: next, content: "" }])}>Add message</button>
        ${messages[0]?.role !== "system" && html`
          <button type="button" onClick=${() => change([{ role: "system", content: "" }, ...messages])}>Add system message</button>`}
      </div>
      <${AsJson} messages=${messages} change=${change} />
    </fieldset>`;
}

function Message({ message, number, change, remove }) {
  const [over, setOver] = useState(false);
  const others = othersOf(message.content);
  const setText = (text) => change({ ...message, content: compose(text, others) });
  const setOthers = (parts) => change({ ...message, content: compose(textOf(message.content), parts) });
  const addFiles = async (files) => {
    const images = [...files].filter((file) => file.type.startsWith("image/"));
    if (images.length) setOthers([...others, ...(await Promise.all(images.map(imagePart)))]);
    return images.length;
  };
  const onPaste = (event) => {
    if ([...event.clipboardData.files].some((file) => file.type.startsWith("image/"))) {
      event.preventDefault();
      addFiles(event.clipboardData.files);
    }
  };
  const onDrop = (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    setOver(false);
    addFiles(event.dataTransfer.files);
  };
  return html`
    <div class=${`message ${over ? "over" : ""}`} onDrop=${onDrop} onDragLeave=${() => setOver(false)}
      onDragOver=${(event) => (event.preventDefault(), setOver(true))}>
      <div class="row">
        <select aria-label=${`Role of message ${number}`} value=${message.role}
          onChange=${(event) => change({ ...message, role: event.target.value })}>
          ${[...new Set([...ROLES, message.role])].map((role) => html`<option value=${role}>${role}</option>`)}
        </select>
        ${message.role === "tool" && html`
          <input aria-label=${`tool_call_id of message ${number}`} placeholder="tool_call_id" value=${message.tool_call_id ?? ""}
            onInput=${(event) => change({ ...message, tool_call_id: event.target.value })} />`}
        <span class="space"></span>
        <${ImageButton} label=${`Add an image to message ${number}`} add=${addFiles} />
        ${remove && html`<button type="button" class="small" aria-label=${`Remove message ${number}`} onClick=${remove}>✕</button>`}
      </div>
      <textarea aria-label=${`Text of message ${number}`} rows="3" value=${textOf(message.content)} onPaste=${onPaste}
        onInput=${(event) => setText(event.target.value)}></textarea>
      ${message.tool_calls && html`<p class="note">tool_calls: ${message.tool_calls.map((call) => call.function.name).join(", ")}</p>`}
      <${Parts} parts=${others} change=${setOthers} />
    </div>`;
}

function ImageButton({ label, add }) {
  const input = useRef();
  const onChange = async () => {
    await add(input.current.files);
    input.current.value = "";
  };
  return html`
    <button type="button" class="small" aria-label=${label} onClick=${() => input.current.click()}>+ image</button>
    <input ref=${input} type="file" accept="image/*" multiple hidden aria-label=${label} onChange=${onChange} />`;
}

function Parts({ parts, change }) {
  if (!parts.length) return null;
  return html`<ul class="parts">${parts.map((part, i) => html`
    <li>
      ${part.image_url?.url?.startsWith("data:image/") ? html`<img src=${part.image_url.url} alt=${`Image ${i + 1}`} />` : html`
        <code>${part.type}</code>`}
      <button type="button" class="small" aria-label=${`Remove image ${i + 1}`}
        onClick=${() => change(parts.filter((_, other) => other !== i))}>✕</button>
    </li>`)}</ul>`;
}

async function imagePart(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  return { type: "image_url", image_url: { url } };
}

function AsJson({ messages, change }) {
  const [text, setText] = useState(null);
  const [error, setError] = useState("");
  const onInput = (event) => {
    setText(event.target.value);
    try {
      const read = parse(event.target.value);
      if (!Array.isArray(read) || !read.every((each) => each && typeof each === "object")) throw new Error("not a list of objects");
      setError("");
      change(read);
    } catch (problem) {
      setError(problem.message);
    }
  };
  return html`
    <details onToggle=${(event) => !event.target.open && setText(null)}>
      <summary>Messages as JSON</summary>
      <textarea class="code" aria-label="Messages as JSON" rows="8" spellcheck=${false} value=${text ?? stringify(messages, 2)}
        onInput=${onInput}></textarea>
      ${error && html`<p class="error" role="alert">${error}</p>`}
    </details>`;
}
