// The dashboard's panels: each takes what the node told and fills its place.

import { byId, copyButton, make, peerId, say, show } from "./dom.js";
import { bytes, capital, count, isNumber, lasting, milliseconds, number, parts, percent, plural, shortId, shorten, time } from "./format.js";

export function headline(state) {
  const { node, health, model, peers, load } = state;
  const names = (model?.models || []).map((each) => each.name);
  const { ready, reason } = health.readiness || {};
  let title = `${capital(reason || "not ready")}`;
  if (ready) {
    const company = health.connected ? `connected to ${plural(health.connected, "peer")}` : "alone so far";
    title = names.length ? `Serving ${names.map((name) => shorten(name, 40)).join(" and ")}, ${company}` : `A door without a model, ${company}`;
  }
  say(byId("headline"), title);
  document.title = `${ready ? "" : "! "}${names[0] ? shorten(names[0], 30) : "Node"} · ${load?.running ? `${load.running} running` : "node"}`;
  show(byId("facts"), "Peer ", peerId(node.peer_id, shortId(node.peer_id)), ` in the network ${node.network}`,
    peers.count > health.connected ? `, which knows ${plural(peers.count, "peer")}` : "");
}

export function joining(node, health) {
  const address = node.listen?.[0];
  if (!address) {
    show(byId("joining"), make("p", { class: "empty" }, "This node listens nowhere, so nobody can join it by an address."));
    return;
  }
  const command = `python -m node --bootstrap ${address}${node.network === "main" ? "" : ` --network ${node.network}`}`;
  const local = address.startsWith("/ip4/127.") || address.startsWith("/ip6/::1");
  show(byId("joining"),
    make("p", {}, local
      ? "On this machine another node joins this one by its address (it listens on loopback only):"
      : ["local", "relayed", "unreachable"].includes(health.reach?.verdict)
        ? "In the same local network another node joins this one by its address. From elsewhere it needs a relay or a forwarded port:"
        : "Another node joins this one by its address:"),
    make("div", { class: "command" }, make("code", {}, command), copyButton("Copy", () => command, { "data-key": "join" })),
    ...(node.listen.length > 1
      ? [make("p", { class: "muted small" }, `It also listens on ${node.listen.slice(1, 5).join(", ")}`)] : []));
}

export function alerts({ health, training }) {
  const notes = (health.readiness?.degraded || []).map((sentence) => make("p", { class: "note warn" }, capital(sentence)));
  for (const each of health.set_aside || []) notes.push(make("p", { class: "note warn" }, capital(String(each))));
  if (training?.problem) notes.push(make("p", { class: "note bad" }, `Training stopped: ${training.problem}`));
  if (health.readiness && !health.readiness.ready) {
    notes.push(make("p", { class: "note warn" }, `Requests wait or are refused for now: ${health.readiness.reason}.`));
  }
  show(byId("alerts"), ...notes);
}

export function tiles({ load, model }) {
  const recent = load.recent || {};
  const { ttft_s: first, token_s: next } = load.latency || {};
  const [wait, unit] = parts(first?.p50);
  const [pace, paceUnit] = parts(next?.p50);
  const share = recent.ended ? recent.errored / recent.ended : null;
  const kinds = Object.entries(load.errors || {}).map(([code, n]) => `${n} ${code.replaceAll("_", " ")}`);
  show(byId("tiles"),
    tile("Tokens a second", number(recent.tokens_out_per_s), "tok/s",
      model ? `to clients; ${number(recent.tokens_made_per_s)} made here` : "to clients, made by peers"),
    tile("Requests a second", number(recent.requests_per_s), "/s", `${plural(load.running || 0, "request")} running, ${count(load.requests || 0)} since start`),
    tile("Errors", isNumber(share) ? percent(share) : "–", "",
      isNumber(share) ? `${count(recent.errored)} of ${plural(recent.ended, "request")} in ${span(recent)}, clients' own mistakes left out` : "none lately", {
        bad: share > 0.02, title: kinds.length ? `Since start: ${kinds.join(", ")}` : "" }),
    tile("First token", wait, unit, isNumber(first?.p95) ? `median; 95 % within ${time(first.p95)}` : "no answer yet"),
    tile("Each next token", pace, paceUnit, isNumber(next?.p95) ? `median; 95 % within ${time(next.p95)}` : "no answer yet"));
}

const span = (recent) => (recent.window_s >= 60 ? lasting(recent.window_s) : `${recent.window_s || 0} s`);

function tile(name, value, unit, under, { bad = false, title = "" } = {}) {
  return make("div", { class: bad ? "card tile bad" : "card tile", title: title || null },
    make("h3", {}, name),
    make("div", { class: "value number" }, value, unit ? make("small", {}, unit) : null),
    make("div", { class: "under number" }, under));
}

export function waits({ load }) {
  const { ttft_s: first, token_s: next, e2e_s: whole } = load.latency || {};
  const rows = [["First token", first], ["Each next token", next], ["Whole answer", whole]];
  const asked = first?.count || 0;
  say(byId("wait-of"), asked ? `${plural(asked, "answer")} since start` : "");
  if (!asked) {
    show(byId("wait"), make("p", { class: "empty" }, "Nobody has asked yet. ",
      make("a", { href: "/chat" }, "Ask something"), ", and what it took stands here."));
    return;
  }
  show(byId("wait"), make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, ""), ...["50 %", "95 %", "99 %"].map((name) =>
      make("th", { scope: "col", class: "right" }, name)))),
    make("tbody", {}, ...rows.map(([name, told]) => make("tr", {}, make("th", { scope: "row" }, name),
      ...["p50", "p95", "p99"].map((key) => make("td", { class: "right" }, time(told?.[key]))))))),
  make("p", { class: "muted small" }, "Within this time, of answers to this node's own clients, as they saw it."));
}

export function model({ model: told, models, health }) {
  const holder = byId("model");
  say(byId("model-device"), told?.device ? `on ${told.device}` : "");
  const served = models.length ? [make("div", { class: "served" }, make("h3", {}, "In the whole network"), make("ul", {},
    ...models.slice(0, 8).map((row) => make("li", {},
      make("span", {}, shorten(row.id, 44), models.some((each) => each.id === row.id && each.revision !== row.revision)
        ? make("span", { class: "muted small" }, ` ${shorten(row.revision, 12)}`) : null),
      make("span", { title: row.revision }, `${plural(row.peers, "node")}${row.local ? ", here too" : ""}`))),
    models.length > 8 ? make("li", {}, make("span", {}, `and ${models.length - 8} more`), make("span", {})) : null))] : [];
  if (!told?.models?.length) {
    show(holder, make("p", { class: "empty" }, health.readiness?.loading
      ? "It is being loaded."
      : ["None. Requests go to peers that have one. Start with ", make("code", {}, "--model NAME"), " to serve one here."]), ...served);
    return;
  }
  const used = told.slots_total - told.slots_free;
  show(holder,
    ...told.models.map((each) => make("div", {},
      make("p", { class: "named" }, each.name),
      make("p", { class: "muted small" }, make("span", { class: "mono" }, each.revision),
        isNumber(each.parameters) && each.parameters ? `, ${number(each.parameters)} parameters` : "",
        `, ${each.quantization && each.quantization !== "none" ? each.quantization : each.dtype}, ${count(each.context_tokens)} tokens of context`))),
    told.slots_total ? meter("Answers at a time", used, told.slots_total, `${used} of ${told.slots_total}`) : null,
    told.slots_total ? meter("Waiting", told.queue_length, told.queue_max || 1, plural(told.queue_length, "request")) : null,
    told.kv_tokens_total ? meter("KV memory", told.kv_tokens_total - told.kv_tokens_free, told.kv_tokens_total,
      `${number(told.kv_tokens_total - told.kv_tokens_free)} of ${number(told.kv_tokens_total)} tokens`) : null,
    ...served);
}

function meter(name, value, most, text) {
  return make("div", { class: value / most > 0.85 ? "meter high" : "meter" },
    make("div", { class: "row" }, make("span", {}, name), make("b", {}, text)),
    make("progress", { value, max: most, "aria-label": name }));
}

export function peers({ peers: told, health }) {
  say(byId("network-of"), told.count ? `${plural(health.connected, "connection")}, ${plural(told.count, "peer")} known` : "");
  say(byId("peers-of"), told.count > told.rows.length ? `the nearest ${told.rows.length} of ${count(told.count)}` : "");
  if (!told.count) {
    const failed = health.bootstrap || [];
    show(byId("peers"), make("p", { class: "empty" },
      "No peer yet. Nodes of the same local network find each other by themselves; from elsewhere they join by an address: see “Join this node” above."),
    ...failed.map((sentence) => make("p", { class: "muted small" }, sentence)));
    return;
  }
  const heads = [["Peer", ""], ["Models", ""], ["Round trip", "right"], ["Way", "optional"], ["Free slots", "right optional"],
    ["Asked by us", "right"], ["Asked us", "right optional"]];
  show(byId("peers"), make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map(([name, kind]) => make("th", { scope: "col", class: kind || null }, name)))),
    make("tbody", {}, ...told.rows.map(row))));
}

function row(peer) {
  const requests = peer.requests || {};
  const flow = (now, total) => (now ? `${count(total)} (${now} now)` : count(total || 0));
  const cell = (kind, ...children) => make("td", { class: kind || null }, ...children);
  return make("tr", {},
    cell("", peerId(peer.peer_id, shortId(peer.peer_id))),
    cell("", peer.models.length
      ? make("span", { title: peer.models.map((each) => each.revision).join("\n") }, shorten(peer.models.map((each) => each.name).join(", "), 48))
      : make("span", { class: "muted" }, "none")),
    cell("right", peer.connected ? milliseconds(peer.rtt_ms) : "–"),
    cell("optional", peer.connected ? (peer.relayed ? "through a relay" : "direct") : "not connected"),
    cell("right optional", isNumber(peer.slots_total) && peer.slots_total ? `${peer.slots_free} of ${peer.slots_total}` : "–"),
    cell("right", flow(requests.to_now, requests.to_total)),
    cell("right optional", flow(requests.from_now, requests.from_total)));
}

// p2p/reach.py, Verdict; docs/operators/router.md says what to do about each
const REACH = {
  public: ["good", "from anywhere"],
  local: ["good", "from the local network"],
  relayed: ["good", "from elsewhere through a relay"],
  unreachable: ["warn", "from nowhere: this node only dials others"],
  unknown: ["plain", "not known yet"],
};

export function health({ health: told, node }) {
  const { readiness, reach, backend } = told;
  const lines = [line(readiness?.ready ? "good" : "warn", "Requests", readiness?.ready ? "are accepted" : readiness?.reason)];
  if (reach) {
    const [kind, words] = REACH[reach.verdict] || ["plain", "not known yet"];
    lines.push(line(kind, "Reach", words, [reach.reason, reach.advice].filter(Boolean).join(". ")));
  }
  const degraded = readiness?.degraded || [];
  lines.push(line(degraded.length ? "warn" : "good", "Disk and clock", degraded.length ? plural(degraded.length, "problem") : "no problem"));
  if (backend && backend.kind !== "transformers") {
    lines.push(line(backend.problem ? "bad" : "good", "Server behind this node", backend.problem || "answers"));
  }
  lines.push(line("plain", "Memory", bytes(node.memory_mb * 1e6)));
  show(byId("health"), make("ul", { class: "health" }, ...lines));
}

function line(kind, name, text, advice = "") {
  const mark = { good: "✓", warn: "!", bad: "✕", plain: "·" }[kind];
  return make("li", { class: kind }, make("span", { class: "mark", "aria-hidden": "true" }, mark),
    make("div", {}, make("strong", {}, name), ` ${text}`, advice ? make("p", { class: "advice" }, advice) : null));
}

export function foot({ node, started }) {
  say(byId("foot"), `Version ${node.version}, network ${node.network}, up ${lasting((Date.now() - started) / 1000)}`);
}
