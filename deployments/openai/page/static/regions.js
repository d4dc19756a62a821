// Which tokens of a text were read as reasoning, as a call of a tool, as content, or as markup around them.

/** The bytes of all tokens as one text, and the token that each character of it belongs to. */
export function joined(tokens) {
  const bytes = Uint8Array.from(tokens.flatMap((token) => token.bytes));
  const ownerOfByte = tokens.flatMap((token, index) => token.bytes.map(() => index));
  const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
  const owners = [];
  let at = 0;
  for (const character of text) {
    for (let i = 0; i < character.length; i++) owners.push(ownerOfByte[at] ?? tokens.length - 1);
    at += character === "\ufffd" ? brokenLength(bytes, at) : utf8Length(character);
  }
  return { text, owners };
}

const utf8Length = (character) => {
  const code = character.codePointAt(0);
  return code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
};

/** How many bytes a decoder has replaced by one U+FFFD: the longest beginning of a character, else one. */
function brokenLength(bytes, at) {
  if (bytes[at] === 0xef && bytes[at + 1] === 0xbf && bytes[at + 2] === 0xbd) return 3;
  const need = bytes[at] >= 0xf0 ? 4 : bytes[at] >= 0xe0 ? 3 : bytes[at] >= 0xc2 ? 2 : 1;
  let length = 1;
  while (length < need && (bytes[at + length] & 0xc0) === 0x80) length++;
  return length;
}

/** The kind of each character of a raw text, from the message that it was read as. */
export function kindsOf(raw, { reasoning = "", content = "", calls = [] }) {
  const kinds = new Array(raw.length).fill(null);
  const end = mark(kinds, raw, reasoning, 0, "reasoning");
  mark(kinds, raw, content, end, "content");
  markRest(kinds, raw, calls);
  return kinds;
}

/** Mark a text where it stands from `from` on, in as few pieces as possible; returns where it ends. */
function mark(kinds, raw, text, from, kind) {
  let rest = text;
  let at = from;
  while (rest) {
    const length = longestFound(raw, rest, at);
    if (!length) return at;
    const found = raw.indexOf(rest.slice(0, length), at);
    kinds.fill(kind, found, found + length);
    at = found + length;
    rest = rest.slice(length);
  }
  return at;
}

function longestFound(raw, text, from) {
  if (raw.indexOf(text, from) >= 0) return text.length;
  let low = 0;
  let high = text.length;
  while (low + 1 < high) {
    const middle = (low + high) >> 1;
    if (raw.indexOf(text.slice(0, middle), from) >= 0) low = middle;
    else high = middle;
  }
  return low;
}

/** What is neither content nor reasoning is a call if the name of a call that was read stands in it. */
function markRest(kinds, raw, calls) {
  for (let i = 0; i < kinds.length; ) {
    let end = i;
    while (end < kinds.length && kinds[end] === kinds[i]) end++;
    if (kinds[i] === null) {
      const text = raw.slice(i, end);
      kinds.fill(calls.some((call) => text.includes(call.name)) ? "call" : "markup", i, end);
    }
    i = end;
  }
}

/** The kind of each token: that of its first character, or of the character that it goes on with. */
export function tokenKinds(tokens, message) {
  const { text, owners } = joined(tokens);
  const kinds = kindsOf(text, message);
  const found = new Array(tokens.length).fill(null);
  for (let i = text.length - 1; i >= 0; i--) found[owners[i]] = kinds[i];
  for (let i = 0; i < found.length; i++) found[i] ??= (tokens[i].bytes.length && found[i - 1]) || "markup";
  return found;
}
