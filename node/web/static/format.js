// Numbers with units, times, and names that fit. What is not known is a dash.

const NONE = "–";

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function number(value, digits = 3) {
  if (!isNumber(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6) return `${trim(value / 1e6, digits)} M`;
  if (size >= 1e4) return `${trim(value / 1e3, digits)} k`;
  return trim(value, digits);
}

function trim(value, digits) {
  const size = Math.abs(value);
  const places = size >= 100 ? 0 : size >= 10 ? Math.max(0, digits - 2) : Math.max(0, digits - 1);
  return String(Number(value.toFixed(places)));
}

export const count = (value) => (isNumber(value) ? value.toLocaleString("en") : NONE);

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

// Seconds as [number, unit], in ms below a second.
export function parts(seconds) {
  if (!isNumber(seconds)) return [NONE, ""];
  if (seconds < 0.0095) return [(seconds * 1000).toFixed(1), "ms"];
  if (seconds < 1) return [String(Math.round(seconds * 1000)), "ms"];
  if (seconds < 10) return [seconds.toFixed(2), "s"];
  return [String(Math.round(seconds)), "s"];
}

export const time = (seconds) => parts(seconds).join(" ").trim();

export function milliseconds(ms) {
  return isNumber(ms) ? time(ms / 1000) : NONE;
}

export function bytes(value) {
  if (!isNumber(value)) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  let left = value;
  while (left >= 1000 && step < units.length - 1) {
    left /= 1000;
    step += 1;
  }
  return `${step ? trim(left, 3) : left} ${units[step]}`;
}

export function lasting(seconds) {
  if (!isNumber(seconds)) return NONE;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86400)} days`;
}

export function percent(share) {
  if (!isNumber(share)) return NONE;
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${trim(share * 100, 3)} %`;
}

export const shortId = (id) => (id && id.length > 14 ? `${id.slice(0, 4)}…${id.slice(-6)}` : id || NONE);

export function shorten(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

export const capital = (text) => (text || "").charAt(0).toUpperCase() + (text || "").slice(1);
