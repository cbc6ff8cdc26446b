// One question with its answer: how it looks while it comes, when it is there, and when it failed.

import { copyButton, make, peerId, show } from "./dom.js";
import { plural, shortId, shorten, time } from "./format.js";
import { update } from "./render.js";

export class Turn {
  // retry(turn) asks the same once more
  constructor(question, retry) {
    this.question = question;
    this.text = "";
    this.failed = false;
    this.body = make("div", { class: "text" });
    this.who = make("div", { class: "who" });
    this.trouble = make("div", { class: "note bad failed", role: "alert", hidden: true });
    this.answer = make("div", { class: "answer running", "aria-busy": "true" }, this.body, this.trouble, this.who);
    this.element = make("article", { class: "turn", "aria-label": `Question: ${shorten(question, 60)}` },
      make("div", { class: "asked" }, make("div", { class: "text" }, question)), this.answer);
    this.retry = retry;
    this.begin();
  }

  begin() {
    Object.assign(this, { text: "", failed: false, by: "", revision: "", model: "", kept: false, began: performance.now(), first: 0, last: 0 });
    this.body.replaceChildren();
    this.who.replaceChildren();
    this.trouble.hidden = true;
    this.answer.classList.add("running");
    this.answer.setAttribute("aria-busy", "true");
  }

  take(item) {
    if (item.text === undefined) {
      Object.assign(this, item);
      return;
    }
    this.last = performance.now();
    this.first ||= this.last;
    this.text += item.text;
    update(this.body, this.text);
  }

  end({ reason, usage }) {
    const tokens = usage?.completion_tokens;
    const seconds = (this.last - this.first) / 1000;
    const speed = tokens > 1 && seconds > 0 && !this.kept ? `${((tokens - 1) / seconds).toFixed(1)} tok/s` : "";
    this.settle(
      tokens === undefined ? "" : plural(tokens, "token"), speed,
      this.kept ? "kept from before" : this.first ? `first after ${time((this.first - this.began) / 1000)}` : "",
      reason === "length" ? "ended at the token limit" : "");
    if (!this.text) this.body.replaceChildren(make("p", { class: "muted" }, "The model ended its answer without a word."));
  }

  stopped() {
    this.settle("stopped by you");
  }

  fail(error) {
    this.failed = true;
    show(this.trouble, make("p", {}, error.message), error.advice ? make("p", {}, error.advice) : null,
      error.wait ? make("p", {}, `The node says to come again after ${plural(error.wait, "second")}.`) : null);
    this.trouble.hidden = false;
    this.settle();
  }

  settle(...told) {
    this.answer.classList.remove("running");
    this.answer.setAttribute("aria-busy", "false");
    const served = this.by ? make("span", {}, "answered by ", ...this.by.split(", ").map((id) => peerId(id, shortId(id)))) : null;
    const weights = this.revision ? make("span", { class: "mono", title: "Exactly these weights" }, `${this.model} ${this.revision}`) : null;
    this.who.replaceChildren(...[served, weights, ...told.filter(Boolean).map((text) => make("span", { class: "number" }, text)),
      make("span", { class: "acts" },
        this.text ? copyButton("Copy", () => this.text, { class: "button quiet" }) : null,
        make("button", { type: "button", class: "button quiet", onclick: () => this.retry(this) }, "Try again"))].filter(Boolean));
  }
}
