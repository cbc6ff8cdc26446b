// Makes elements, and changes them only where they differ. Text is always inserted as text.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function make(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

export function draw(name, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, name), properties, children);
}

export const byId = (id) => document.getElementById(id);

export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Replaces what is in an element, unless it would look the same: so focus, selection and screen readers stay.
export function show(element, ...children) {
  const fresh = element.cloneNode(false);
  fresh.append(...children.flat().filter(Boolean));
  if (!element.isEqualNode(fresh)) {
    const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    element.replaceChildren(...fresh.childNodes);
    if (focused) element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }
}

export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // the browser asked and the user said no, or the page has no focus: the older way may still do
    }
  }
  const area = make("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus?.();
  return done;
}

// A button that copies what `text()` gives, and says so for a moment.
export function copyButton(label, text, properties = {}) {
  const told = make("span", {}, label);
  const button = make("button", { type: "button", class: "button", ...properties }, told);
  button.addEventListener("click", async () => {
    const done = await copy(text());
    told.textContent = done ? "Copied" : "Select it and press Ctrl+C";
    announce(done ? "Copied" : "It could not be copied");
    setTimeout(() => { told.textContent = label; }, 1600);
  });
  return button;
}

// A peer's id, short; the full one is copied by a click and shown on hover.
export function peerId(id, short) {
  return make("button", {
    type: "button", class: "id-button", title: `${id} (click to copy)`, "aria-label": `Copy the peer id ${short}`,
    "data-copy": id, "data-key": `id ${id}`,
  }, short);
}

// One listener for all ids: rows are made anew as they change.
export function copiesIds(root) {
  root.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (button && await copy(button.dataset.copy)) announce("Peer id copied");
  });
}

let region;

// Says a sentence to screen readers, and to nobody else.
export function announce(text) {
  if (!region) {
    region = make("div", { class: "unseen", role: "status", "aria-live": "polite" });
    document.body.append(region);
  }
  region.textContent = text;
}
