// Light or dark: the system's setting, unless the user has chosen.

import { html, useState } from "./preact.js";

const STORED = "troupe-theme";
const CHOICES = ["auto", "light", "dark"];

function apply(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(STORED, theme);
}

const stored = localStorage.getItem(STORED);
apply(CHOICES.includes(stored) ? stored : "auto");

export function ThemeSwitch() {
  const [theme, setTheme] = useState(document.documentElement.dataset.theme);
  const onChange = (event) => {
    apply(event.target.value);
    setTheme(event.target.value);
  };
  return html`
    <select class="small" aria-label="Theme" value=${theme} onChange=${onChange}>
      ${CHOICES.map((choice) => html`<option value=${choice}>${choice}</option>`)}
    </select>`;
}
