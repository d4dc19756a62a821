// Inputs for every field of a route's body, in groups; an empty one is not sent.

import { html } from "./preact.js";

/** @param values texts by field; `change` is called with a name and its new text. */
export function RequestFields({ groups, values, change }) {
  return html`${groups.map((group) => {
    const used = group.fields.filter((field) => values[field.name]?.trim());
    return html`
      <details class="fields" open=${group.name === "Sampling" || undefined}>
        <summary>${group.name}${used.length > 0 && html` <span class="used">${used.map((field) => field.name).join(", ")}</span>`}</summary>
        <div class="grid">${group.fields.map((field) => html`
          <${RequestField} field=${field} value=${values[field.name] ?? ""} change=${(text) => change(field.name, text)} />`)}</div>
      </details>`;
  })}`;
}

function RequestField({ field, value, change }) {
  const id = `field-${field.name}`;
  const shared = { id, name: field.name, value, "aria-describedby": field.hint ? `${id}-hint` : null };
  const onInput = (event) => change(event.target.value);
  const placeholder = field.initial || "not sent";
  return html`
    <div class=${`field ${field.kind === "json" ? "wide" : ""}`}>
      <label for=${id}>${field.name}</label>
      ${field.kind === "boolean" || field.kind === "choice" ? html`
        <select ...${shared} onChange=${onInput}>
          <option value="">${field.initial ? `not sent (${field.initial})` : "not sent"}</option>
          ${(field.kind === "boolean" ? ["true", "false"] : field.choices).map((choice) => html`
            <option value=${choice}>${choice}</option>`)}
        </select>` : field.kind === "json" ? html`
        <textarea ...${shared} class="code" rows="1" spellcheck=${false} placeholder=${placeholder} onInput=${onInput}></textarea>` : html`
        <input ...${shared} inputmode=${field.kind === "number" ? "decimal" : "text"} autocomplete="off" placeholder=${placeholder}
          onInput=${onInput} />`}
      ${field.hint && html`<p class="hint" id=${`${id}-hint`}>${field.hint}</p>`}
    </div>`;
}
