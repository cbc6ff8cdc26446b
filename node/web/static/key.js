// The API key, for nodes that want one. It is kept for this tab only (sessionStorage) and sent to this node only.

import { make } from "./dom.js";

const NAME = "node-api-key";

export const key = () => sessionStorage.getItem(NAME) || "";

export function keep(value) {
  const text = value.trim();
  if (text) sessionStorage.setItem(NAME, text);
  else sessionStorage.removeItem(NAME);
}

export function headers(more = {}) {
  return key() ? { ...more, authorization: `Bearer ${key()}` } : more;
}

// Asks for a key that may look in a dialog, and says why the last one did not do; true once one was given.
export function ask(dialog, why) {
  return new Promise((resolve) => {
    const field = make("input", { id: "key-field", type: "password", autocomplete: "off", required: true });
    const form = make("form", { method: "dialog" },
      make("h2", { id: "key-title" }, "This node wants an API key"),
      key() ? make("p", { class: "note bad", role: "alert" }, `The key that was given does not do: ${why}.`) : null,
      make("p", { class: "muted" }, "Its operator makes one for this page with ",
        make("code", {}, "python -m node keys create --name NAME --scope metrics"), ". It stays in this tab and is forgotten when the tab is closed."),
      make("div", {}, make("label", { for: "key-field" }, "API key"), field),
      make("div", {}, make("button", { class: "button strong" }, "Use it")));
    dialog.replaceChildren(form);
    dialog.addEventListener("close", () => {
      keep(field.value);
      resolve(Boolean(field.value.trim()));
    }, { once: true });
    dialog.showModal();
  });
}
