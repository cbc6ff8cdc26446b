// Shows a model's answer: paragraphs, fenced code and `code`. All of it is a stranger's text, and stays text.

import { make } from "./dom.js";

// The elements of a text; one that is still coming may end within a fence.
export function rendered(text) {
  const parts = [];
  let code = null;
  let lines = [];
  const close = () => {
    const joined = lines.join("\n");
    lines = [];
    if (code !== null) parts.push(make("pre", { tabindex: "0", "aria-label": code ? `Code, ${code}` : "Code" }, make("code", {}, joined)));
    else if (joined.trim()) parts.push(make("p", {}, ...spans(joined.replace(/^\n+|\n+$/g, ""))));
    code = null;
  };
  for (const line of text.split("\n")) {
    const fence = /^ {0,3}```\s*([\w+#.-]{0,20})/.exec(line);
    if (fence && code === null) {
      close();
      code = fence[1];
    } else if (fence) {
      close();
    } else if (code === null && !line.trim()) {
      close();
    } else {
      lines.push(line);
    }
  }
  if (lines.length || code !== null) close();
  return parts;
}

function spans(text) {
  return text.split(/(`[^`\n]+`)/).filter(Boolean).map((part) => (
    part.length > 2 && part.startsWith("`") && part.endsWith("`") ? make("code", {}, part.slice(1, -1)) : part));
}

// Replaces only what has changed: while text streams, that is the last paragraph.
export function update(holder, text) {
  const fresh = rendered(text);
  const there = [...holder.children];
  fresh.forEach((part, n) => {
    if (!there[n]) holder.append(part);
    else if (!there[n].isEqualNode(part)) there[n].replaceWith(part);
  });
  there.slice(fresh.length).forEach((part) => part.remove());
}
