// The dashboard: follows the node's events and gives each panel what has changed.

import { Chart } from "./chart.js";
import { byId, copiesIds, draw, make, say } from "./dom.js";
import { number } from "./format.js";
import { follow } from "./live.js";
import { Network } from "./network.js";
import * as panels from "./panels.js";
import { SelfPanel } from "./self.js";
import { TrainingPanel } from "./training.js";

const WINDOW_S = 300;
const FOOT_MS = 5000;

const speed = new Chart(byId("speed"), {
  height: 220,
  fromZero: true,
  series: [
    { kind: "first", of: (row) => row.tokens_out_s },
    { kind: "second", of: (row) => row.tokens_made_s },
  ],
  x: {
    of: (row) => row.at,
    range: () => [-WINDOW_S, 0],
    ticks: (from, to, width) => (width < 420 ? [-240, -120, 0] : [-300, -240, -180, -120, -60, 0])
      .map((at) => ({ at, text: at ? `${-at / 60} min ago` : "now" })),
  },
  label: (rows) => (rows.length
    ? `Tokens a second in the last five minutes: now ${number(rows.at(-1).tokens_out_s)} to clients, ${number(rows.at(-1).tokens_made_s)} made here`
    : "Tokens a second: nothing measured yet"),
  read: (row) => `${number(row.tokens_out_s)} to clients, ${number(row.tokens_made_s)} made here, ${Math.round(-row.at)} s ago`,
});
const network = new Network(byId("network"), byId("network-legend"));
const training = new TrainingPanel();
const own = new SelfPanel();

// Samples with the seconds before now at which they ended.
function timed(history) {
  let at = 0;
  const rows = [];
  for (const sample of [...history].reverse()) {
    rows.push({ ...sample, at });
    at -= sample.seconds;
  }
  return rows.reverse().filter((row) => row.at >= -WINDOW_S);
}

// Which sections of what the node tells each panel is made of.
const PARTS = [
  [["node", "health", "model", "peers", "load"], panels.headline],
  [["node", "health"], (state) => panels.joining(state.node, state.health)],
  [["health", "training"], panels.alerts],
  [["load", "model"], panels.tiles],
  [["load"], panels.waits],
  [["model", "models", "health"], panels.model],
  [["peers", "health"], panels.peers],
  [["health", "node"], panels.health],
  [["history"], (state) => speed.show(timed(state.history))],
  [["node", "model", "peers"], (state) => network.show(state.node, state.model, state.peers)],
  [["training", "rounds", "load", "node"], (state) => training.show(state)],
  [["node"], panels.foot],
];

let known = null;

function told(state, changed) {
  known = state;
  for (const [sections, paint] of PARTS) {
    if (sections.some((name) => changed.has(name))) paint(state);
  }
  if (changed.has("self")) {
    if (state.self) own.follow();
    else byId("self-card").hidden = true;
  }
}

function said(kind, text) {
  const pill = byId("live");
  pill.className = `pill ${kind}`;
  say(pill, text);
}

function legend() {
  const stroke = (kind) => draw("svg", { width: 26, height: 8, "aria-hidden": "true" },
    draw("line", { class: `line ${kind}`, x1: 2, x2: 24, y1: 4, y2: 4 }));
  return [make("span", {}, stroke("first"), "to this node's clients"), make("span", {}, stroke("second"), "made here, for anybody")];
}

byId("join").addEventListener("click", () => {
  const open = byId("joining").hidden;
  byId("joining").hidden = !open;
  byId("join").setAttribute("aria-expanded", String(open));
});
byId("speed-legend").replaceChildren(...legend());
copiesIds(document.body);
setInterval(() => { if (known) panels.foot(known); }, FOOT_MS);
follow(byId("key"), told, said);
