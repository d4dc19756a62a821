// Numbers as text: exact where they come from the API, short where the page has computed them.

export const count = (value) => (value === undefined || value === null ? "–" : String(value));
export const seconds = (value) => (value === undefined || value === null ? "–" : `${value.toFixed(3)} s`);
export const percent = (logprob) => {
  const share = Math.exp(logprob) * 100;
  return share >= 0.0995 ? `${share.toFixed(share >= 9.995 ? 1 : 2)}%` : `${share.toExponential(1)}%`;
};

export function bytes(value) {
  if (value === undefined || value === null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** The text of a token with its white space and its unfinished bytes visible. */
export function visible({ token, bytes: raw }) {
  if (raw && token.includes("\ufffd")) return raw.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  return token.replace(/\r/g, "␍").replace(/\t/g, "⇥\t").replace(/\n/g, "⏎\n") || "∅";
}
