// JSON with whole numbers of any size: JavaScript's own numbers would round a seed of 64 bits.

function exact(_key, value, context) {
  const whole = typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
  return whole && /^-?\d+$/.test(context?.source ?? "") ? BigInt(context.source) : value;
}

function raw(_key, value) {
  if (typeof value !== "bigint") return value;
  return JSON.rawJSON ? JSON.rawJSON(value.toString()) : Number(value);
}

export const parse = (text) => JSON.parse(text, exact);
export const stringify = (value, indent) => JSON.stringify(value, raw, indent);
