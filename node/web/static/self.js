// The panel of what the node measured of itself: built once, then only its texts change, so that focus and what is
// opened stay. Asks every ASK_MS, and only while somebody looks at the page.

import { Chart } from "./chart.js";
import { announce, byId, draw, make, say, show } from "./dom.js";
import { bytes, capital, count, isNumber, number, percent, plural } from "./format.js";
import { headers } from "./key.js";

const ASK_MS = 10000;
const HISTORY_MS = 30000;
const SNAPSHOTS = 120;
const PLOTS = ["uncertainty.entropy_nats", "surprise.nll_nats", "load.loop_lag_ms", "self_prediction_error.latency_s.error"];
const NAMES = {
  "uncertainty.entropy_nats": "Uncertainty: entropy of the next token",
  "surprise.nll_nats": "Surprise: held-out text",
  "load.loop_lag_ms": "Event loop lag",
  "self_prediction_error.latency_s.error": "Error of its own forecast of latency",
};
const FORETOLD = {
  latency_s: ["Latency", "s"], active_requests: ["Requests under way", ""], live_peers: ["Live peers", ""], loss_nats: ["Held-out loss", "nats/token"],
};
const BARS = { width: 320, height: 132, left: 8, top: 14, bottom: 22 };

async function got(path) {
  const response = await fetch(path, { headers: headers(), cache: "no-store" });
  const told = await response.json();
  if (!response.ok || told.error) throw new Error(told.error?.message || `the node answered ${response.status}`);
  return told;
}

const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");
const spaced = (name) => name.replaceAll("_", " ");

// A member's value with its unit, as people read it.
export function valued(value, unit) {
  if (value === null || value === undefined) return "not measured";
  if (unit === "Unix ms") return new Date(value).toLocaleString("en-GB");
  if (unit === "bytes") return bytes(value);
  if (Array.isArray(value)) return value.map((each) => number(each)).join(", ");
  if (typeof value === "object") {
    const parts = Object.entries(value).map(([name, each]) => `${name}: ${count(each)}`);
    return parts.length ? parts.join(", ") : "none";
  }
  if (!isNumber(value)) return String(value);
  const figure = Number.isInteger(value) ? count(value) : number(value);
  return unit ? `${figure} ${unit}` : figure;
}

// One bar a bin of confidence: how much too sure (up) or not sure enough (down), in shares of all judged tokens.
function bars(gaps, tokens) {
  const { width, height, left, top, bottom } = BARS;
  const shares = gaps.map((gap) => gap / tokens);
  const most = Math.max(...shares.map(Math.abs), 1e-9);
  const middle = top + (height - top - bottom) / 2;
  const step = (width - 2 * left) / shares.length;
  const told = shares.map((share, n) => `${n * 10} to ${(n + 1) * 10} %: ${percent(Math.abs(share))} ${share > 0 ? "too sure" : "not sure enough"}`);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Calibration by confidence. ${told.join("; ")}` });
  shares.forEach((share, n) => {
    const size = (Math.abs(share) / most) * (middle - top);
    picture.append(draw("rect", {
      class: share > 0 ? "over" : "under", x: left + n * step + 2, width: step - 4, y: share > 0 ? middle - size : middle, height: size,
    }, draw("title", {}, told[n])));
  });
  picture.append(draw("line", { class: "base-line", x1: left, x2: width - left, y1: middle, y2: middle }),
    draw("text", { x: left, y: 10 }, `too sure, up to ${percent(most)}`),
    draw("text", { x: width - left, y: 10, "text-anchor": "end" }, "below: not sure enough"),
    draw("text", { x: left, y: height - 6 }, "confidence 0 %"),
    draw("text", { x: width - left, y: height - 6, "text-anchor": "end" }, "100 %"));
  return picture;
}

export class SelfPanel {
  constructor() {
    this.card = byId("self-card");
    this.members = new Map(); // path -> its value's element
    this.groups = new Map(); // field -> the element that says how many are measured
    this.charts = new Map();
    this.following = false;
    this.historyAt = 0;
  }

  // Follows for as long as the page is open. Only the first call counts.
  async follow() {
    this.card.hidden = false;
    if (this.following) return;
    this.following = true;
    byId("self-verify").addEventListener("click", () => this.verify());
    this.hushOnEscape();
    for (;;) {
      if (document.visibilityState === "visible") await this.look();
      await new Promise((resume) => {
        const wake = () => {
          clearTimeout(timer);
          document.removeEventListener("visibilitychange", wake);
          resume();
        };
        const timer = setTimeout(wake, ASK_MS);
        document.addEventListener("visibilitychange", wake);
      });
    }
  }

  async look() {
    try {
      const told = await got("/api/v1/self");
      this.paint(told);
      if (Date.now() - this.historyAt >= HISTORY_MS) {
        this.historyAt = Date.now();
        const paths = PLOTS.map((path) => `path=${path}`).join("&");
        this.plot(await got(`/api/v1/self/history?${paths}&n=${SNAPSHOTS}`));
      }
      show(byId("self-problem"));
    } catch (error) {
      if (error instanceof TypeError) return; // the connection's own state says that the node is away
      show(byId("self-problem"), make("p", { class: "note warn" }, capital(error.message)));
    }
  }

  paint(told) {
    if (!this.members.size) this.build(told.fields);
    say(byId("self-at"), `measured at ${clock(told.at_ms)}`);
    say(byId("self-now"), told.doing);
    say(byId("self-before"), told.before || "nothing is remembered of a run before");
    const values = new Map();
    const measured = new Map();
    for (const { path, value, unit } of told.fields) {
      const text = valued(value, unit);
      values.set(path, value);
      const place = this.members.get(path);
      if (place) {
        say(place, text);
        place.className = value === null ? "muted" : "";
      }
      const [field] = path.split(".");
      const [some, all] = measured.get(field) || [0, 0];
      measured.set(field, [some + (value === null ? 0 : 1), all + 1]);
    }
    for (const [field, place] of this.groups) {
      const [some, all] = measured.get(field) || [0, 0];
      say(place, `${some} of ${all} measured`);
    }
    this.calibration(values.get("calibration.gaps"), values.get("calibration.tokens"), values.get("calibration.error"));
    this.foretold(told.prediction);
    this.memory(told.memory, told.cost);
  }

  build(fields) {
    const groups = new Map();
    for (const row of fields) {
      const [field] = row.path.split(".");
      if (!groups.has(field)) groups.set(field, []);
      groups.get(field).push(row);
    }
    const made = [...groups].map(([field, rows]) => {
      const howMany = make("span", { class: "muted small" });
      this.groups.set(field, howMany);
      return make("details", { class: "field" },
        make("summary", {}, make("span", {}, capital(spaced(field))), " ", howMany),
        make("ul", {}, ...rows.map((row) => this.member(row))));
    });
    byId("self-fields").replaceChildren(...made);
    byId("self-plots").replaceChildren(...PLOTS.filter((path) => fields.some((row) => row.path === path)).map((path) => {
      const row = fields.find((each) => each.path === path);
      return this.chart(path, row.unit);
    }), this.barsPlace());
  }

  // One member: its name is a button whose formula is shown on hover and focus, and described to who does not see it.
  member({ path, unit, formula, source }) {
    const id = `formula-${path.replaceAll(".", "-")}`;
    const value = make("span", { class: "muted" });
    this.members.set(path, value);
    return make("li", { class: "member" },
      make("button", { type: "button", class: "member-name", "aria-describedby": id }, spaced(path.split(".").slice(1).join(" "))),
      value,
      make("span", { class: "formula", role: "tooltip", id }, formula, unit ? ` In ${unit}.` : "", make("span", { class: "muted" }, ` From: ${source}.`)));
  }

  chart(path, unit) {
    const holder = make("div", { class: "chart" });
    const last = make("span", { class: "muted small number" });
    const name = NAMES[path];
    const text = (value) => (isNumber(value) ? `${number(value)} ${unit}` : "nothing measured");
    const newest = (rows) => rows.findLast((row) => isNumber(row.value))?.value;
    const chart = new Chart(holder, {
      height: 120,
      fromZero: path === "load.loop_lag_ms",
      series: [{ kind: "first", of: (row) => row.value }],
      x: {
        of: (row) => row.at,
        range: (rows) => (rows.length ? [rows[0].at, Math.max(rows.at(-1).at, rows[0].at + 1)] : [0, 1]),
        ticks: (from, to) => (to - from > 1 ? [{ at: from, text: clock(from).slice(0, 5) }, { at: to, text: clock(to).slice(0, 5) }] : []),
      },
      label: (rows) => `${name}: ${rows.length ? `${text(newest(rows))}, newest of ${plural(rows.length, "snapshot")}` : "nothing remembered yet"}`,
      read: (row) => `${text(row.value)} at ${clock(row.at)}`,
    });
    this.charts.set(path, { chart, last, text, newest });
    return make("div", { class: "small-plot" }, make("h3", {}, name), last, holder);
  }

  plot(history) {
    for (const [path, { chart, last, text, newest }] of this.charts) {
      const values = history.figures[path] || [];
      const rows = history.ts_ms.map((at, n) => ({ at, value: isNumber(values[n]) ? values[n] : null }));
      chart.holder.hidden = newest(rows) === undefined;
      chart.show(rows);
      say(last, text(newest(rows)));
    }
  }

  barsPlace() {
    return make("div", { class: "small-plot" }, make("h3", {}, "Calibration by confidence"),
      make("span", { class: "muted small number", id: "self-calibration-error" }), make("div", { class: "chart", id: "self-bars" }));
  }

  calibration(gaps, tokens, error) {
    const known = Array.isArray(gaps) && isNumber(tokens) && tokens > 0;
    say(byId("self-calibration-error"), known ? `expected error ${number(error)}, of ${number(tokens)} tokens` : "nothing measured");
    show(byId("self-bars"), known ? bars(gaps, tokens) : make("p", { class: "empty" }, "No held-out text was looked at yet."));
  }

  foretold(prediction) {
    if (!prediction) {
      show(byId("self-foretold"), make("p", { class: "empty" }, "It foretells once two periods were measured."));
      return;
    }
    show(byId("self-foretold"), make("p", { class: "muted small" }, `for the time until ${clock(prediction.to_ms)}; in brackets, where four of five are meant to lie`),
      make("dl", { class: "figures" }, ...Object.entries(prediction.figures).map(([name, each]) => make("div", {},
        make("dt", {}, (FORETOLD[name] || [spaced(name)])[0]),
        make("dd", {}, `${number(each.value)} (${number(each.low)} to ${number(each.high)})${FORETOLD[name]?.[1] ? ` ${FORETOLD[name][1]}` : ""}`)))));
  }

  memory(memory, cost) {
    const shares = Object.values(cost || {}).map((each) => each.share).filter(isNumber);
    const head = memory.head_id ? `, the last one number ${count(memory.head_id)} with the hash ` : "";
    show(byId("self-memory"),
      make("p", {}, `${plural(memory.entries || 0, "event")} in ${bytes(memory.bytes || 0)}${head}`,
        head ? make("code", { class: "hash" }, memory.head_hash) : null),
      shares.length ? make("p", { class: "muted small" }, `All of this takes ${percent(shares.reduce((sum, each) => sum + each, 0))} of the process's CPU time.`) : null,
      ...[memory.degraded, memory.set_aside].filter(Boolean).map((sentence) => make("p", { class: "note warn" }, capital(sentence))));
  }

  async verify() {
    const button = byId("self-verify");
    const place = byId("self-verified");
    button.disabled = true;
    show(place, make("p", { class: "note" }, "Walking the chain, event by event…"));
    let kind = "note warn";
    let text;
    try {
      const told = await got("/api/v1/memory/verify");
      kind = told.is_whole ? "note" : "note bad";
      text = told.is_whole
        ? `Whole: ${plural(told.events, "event")}, each is what was written.`
        : `Not whole: ${told.fault.id ? `event ${told.fault.id}` : "the file"}: ${told.fault.why}`;
    } catch (error) {
      text = error instanceof TypeError ? "The node does not answer." : capital(error.message);
    }
    show(place, make("p", { class: kind }, text));
    announce(text);
    button.disabled = false;
  }

  // A formula that is in the way goes with Escape, until another is asked for.
  hushOnEscape() {
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.card.classList.add("hushed"); });
    for (const name of ["focusin", "pointerover"]) {
      this.card.addEventListener(name, (event) => { if (event.target.closest(".member-name")) this.card.classList.remove("hushed"); });
    }
  }
}
