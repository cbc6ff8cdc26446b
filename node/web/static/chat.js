// The chat page: what was said, who may be asked, and one answer at a time. Nothing is kept when the page is closed.

import { announce, byId, copiesIds, make, show } from "./dom.js";
import { complete, models } from "./completion.js";
import { count, plural, shorten } from "./format.js";
import { keep, key } from "./key.js";
import { Turn } from "./turn.js";

const MODELS_MS = 15000;
const NEAR_END = 80; // pixels: who reads further up is not pulled down
const STARTS = ["Tell me a story about a fox who could not sleep.", "What can you do?", "Write a short poem about rain."];
const SPOKEN_MS = 1200; // while text streams, screen readers get whole sentences, so often at most

const talk = byId("talk");
const prompt = byId("prompt");
let turns = [];
let running = null; // the AbortController of the answer that comes now
let offered = [];

async function listModels() {
  try {
    offered = await models();
    const select = byId("model");
    const chosen = select.value;
    const options = offered.map((model) => make("option", { value: model.id },
      `${shorten(model.id, 48)} (${model.local ? "here" : "elsewhere"}, ${plural(model.peers, "node")})`));
    if (!options.length) options.push(make("option", { value: "" }, "no model is served now"));
    show(select, ...options);
    if (offered.some((model) => model.id === chosen)) select.value = chosen;
    if (!turns.length) welcome();
  } catch (error) {
    if (error.status === 401 && byId("drawer").hidden) openSettings(byId("api-key")); // else it is being typed
    if (!offered.length) show(byId("model"), make("option", { value: "" }, "not known"));
    if (!turns.length) welcome(error);
  }
}

function welcome(error) {
  const model = offered.find((each) => each.id === byId("model").value) || offered[0];
  const told = error
    ? [make("p", {}, error.message), make("p", {}, error.advice || "")]
    : model
      ? [make("p", {}, `The model ${shorten(model.id, 48)} answers, from ${model.local ? "this node" : plural(model.peers, "peer")}${
        model.context_tokens ? `; it reads ${count(model.context_tokens)} tokens` : ""}.`)]
      : [make("p", {}, "No node that this one knows serves a model. Start one with ", make("code", {}, "python -m node"),
        ", or join a network where one is served.")];
  const starts = model && !error ? make("div", { class: "starts" }, ...STARTS.map((text) => make("button", {
    type: "button", class: "button", "data-key": text, onclick: () => { prompt.value = text; send(); } }, text))) : null;
  // handlers are lost when a clone is compared, so it is made anew only when its words differ
  const fresh = make("div", { class: "welcome" }, make("h2", {}, "Ask the network"), ...told, starts);
  if (talk.textContent !== fresh.textContent) talk.replaceChildren(fresh);
}

function messages(until) {
  const list = [];
  const system = byId("system").value.trim();
  if (system) list.push({ role: "system", content: system });
  for (const turn of turns) {
    if (turn === until) break;
    if (turn.failed || !turn.text) continue;
    list.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.text });
  }
  return [...list, { role: "user", content: until.question }];
}

function body(turn) {
  const asked = { messages: messages(turn) };
  const [model, temperature, tokens] = ["model", "temperature", "tokens"].map((id) => byId(id).value);
  if (model) asked.model = model;
  if (temperature !== "") asked.temperature = Number(temperature);
  if (tokens !== "") asked.max_tokens = Number(tokens);
  return asked;
}

function atEnd() {
  return talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR_END;
}

function follow(was) {
  if (was) talk.scrollTop = talk.scrollHeight;
}

// Says the answer to screen readers a sentence or more at a time.
class Speaker {
  constructor() {
    this.said = 0;
    this.at = 0;
    byId("spoken").replaceChildren();
  }

  hear(text, isWhole) {
    const now = performance.now();
    if (!isWhole && now - this.at < SPOKEN_MS) return;
    const rest = text.slice(this.said);
    const end = isWhole ? rest.length : Math.max(...[". ", "! ", "? ", "\n"].map((mark) => rest.lastIndexOf(mark))) + 1;
    if (end <= 0) return;
    this.said += end;
    this.at = now;
    byId("spoken").append(make("p", {}, rest.slice(0, end).trim()));
  }
}

async function run(turn) {
  running = new AbortController();
  const speaker = new Speaker();
  controls();
  try {
    const end = await complete(body(turn), running.signal, (item) => {
      const was = atEnd();
      turn.take(item);
      speaker.hear(turn.text, false);
      follow(was);
    });
    const was = atEnd();
    turn.end(end);
    speaker.hear(turn.text, true);
    follow(was);
    announce("The answer is complete");
  } catch (error) {
    if (error.name === "AbortError") {
      turn.stopped();
      announce("Stopped");
    } else {
      turn.fail(error);
      if (error.status === 401) openSettings(byId("api-key"));
    }
    follow(true);
  } finally {
    running = null;
    controls();
  }
}

function send() {
  const question = prompt.value.trim();
  if (!question || running) return;
  if (!turns.length) talk.replaceChildren();
  const turn = new Turn(question, again);
  turns.push(turn);
  talk.append(turn.element);
  prompt.value = "";
  grow();
  follow(true);
  run(turn);
}

// The same question once more: what came after it is no longer part of the conversation.
function again(turn) {
  if (running) return;
  const place = turns.indexOf(turn);
  turns.splice(place + 1).forEach((later) => later.element.remove());
  turn.begin();
  prompt.focus();
  run(turn);
}

function controls() {
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
}

function stop() {
  running?.abort();
  prompt.focus();
}

function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function openSettings(field) {
  byId("drawer").hidden = false;
  byId("settings").setAttribute("aria-expanded", "true");
  (field || byId("system")).focus();
}

function closeSettings() {
  byId("drawer").hidden = true;
  byId("settings").setAttribute("aria-expanded", "false");
  byId("settings").focus();
}

byId("options").addEventListener("submit", (event) => event.preventDefault());
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (!byId("drawer").hidden) closeSettings();
});
byId("stop").addEventListener("click", stop);
byId("settings").addEventListener("click", () => (byId("drawer").hidden ? openSettings() : closeSettings()));
byId("fresh").addEventListener("click", () => {
  running?.abort();
  turns = [];
  talk.replaceChildren();
  byId("spoken").replaceChildren();
  welcome();
  prompt.focus();
});
byId("model").addEventListener("change", () => { if (!turns.length) welcome(); });
byId("api-key").value = key();
byId("api-key").addEventListener("change", (event) => { keep(event.target.value); listModels(); });
copiesIds(talk);
listModels();
setInterval(listModels, MODELS_MS);
prompt.focus();
