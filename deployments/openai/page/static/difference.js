// Where two answers, or two requests, begin to differ.

import { stringify } from "./exact.js";

/**
 * The first token of each side that differs: {a, b}, indexes that may be past the end; null if both are equal.
 * Tokens of one model are compared by id, those of two models by their bytes.
 */
export function firstDifference(a, b, { byId }) {
  return byId ? differenceOf(a.map((token) => token.id), b.map((token) => token.id), (i) => i, (i) => i) : byBytes(a, b);
}

function byBytes(a, b) {
  const owners = (tokens) => tokens.flatMap((token, index) => token.bytes.map(() => index));
  const [ownersA, ownersB] = [owners(a), owners(b)];
  const bytes = (tokens) => tokens.flatMap((token) => token.bytes);
  return differenceOf(bytes(a), bytes(b), (i) => ownersA[i] ?? a.length, (i) => ownersB[i] ?? b.length);
}

function differenceOf(a, b, tokenOfA, tokenOfB) {
  const length = Math.min(a.length, b.length);
  let at = 0;
  while (at < length && a[at] === b[at]) at++;
  return at === a.length && at === b.length ? null : { a: tokenOfA(at), b: tokenOfB(at) };
}

/** The fields of two bodies whose values are not equal: [{name, a, b}] as JSON. */
export function differentFields(a, b) {
  const names = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort();
  return names.map((name) => ({ name, a: stringify(a[name]), b: stringify(b[name]) })).filter((each) => each.a !== each.b);
}
