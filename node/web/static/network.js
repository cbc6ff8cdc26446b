// The picture of the network: this node in the middle, peers as far away as their round trip takes, requests moving.

import { draw, make } from "./dom.js";
import { isNumber, milliseconds, plural, shortId, shorten } from "./format.js";

const NEAR_MS = 0.5; // on the innermost circle that is used
const FAR_MS = 500;
const RINGS_MS = [1, 10, 100];
const DRAWN_MAX = 24;
const COLOURS = 6;

// Where a round trip stands between 0 (near) and 1 (far), by its logarithm; unknown ones stand outside.
function distance(peer) {
  if (!peer.connected || !isNumber(peer.rtt_ms)) return 1;
  const ms = Math.min(FAR_MS, Math.max(NEAR_MS, peer.rtt_ms));
  return Math.log(ms / NEAR_MS) / Math.log(FAR_MS / NEAR_MS);
}

// Each model name's colour, by the order of names.
export function colours(names) {
  return new Map([...new Set(names)].sort().map((name, n) => [name, n % COLOURS]));
}

export class Network {
  constructor(holder, legend) {
    this.holder = holder;
    this.legend = legend;
    this.last = null;
    this.drawn = "";
    new ResizeObserver(() => this.paint()).observe(holder);
  }

  show(node, model, peers) {
    this.last = { node, model, peers };
    this.paint();
  }

  paint() {
    if (!this.last) return;
    const width = Math.max(260, Math.floor(this.holder.clientWidth));
    const { node, model, peers } = this.last;
    const rows = peers.rows.slice(0, DRAWN_MAX).sort((a, b) => (a.peer_id < b.peer_id ? -1 : 1));
    // a picture that would be the same is left: moving dashes would start again each second
    const looks = JSON.stringify([width, node?.peer_id, model?.models, peers.count, rows.map((row) => [
      row.peer_id, row.connected, row.relayed, row.models, Math.round(Math.log2(row.rtt_ms || 1) * 4), milliseconds(row.rtt_ms),
      row.requests?.to_now, row.requests?.from_now])]);
    if (looks === this.drawn) return;
    this.drawn = looks;
    const own = (model?.models || []).map((each) => each.name);
    const colour = colours([...own, ...rows.flatMap((row) => row.models.map((each) => each.name))]);
    this.holder.replaceChildren(this.picture(width, rows, own, colour, peers.count));
    this.legend.replaceChildren(...this.explained(colour, rows));
  }

  picture(width, rows, own, colour, count) {
    const narrow = width < 480;
    const height = narrow ? Math.round(width * 0.98) : Math.min(460, Math.round(width * 0.56));
    const centre = { x: width / 2, y: height / 2 };
    const inner = { x: narrow ? 52 : 92, y: narrow ? 52 : 62 };
    const outer = { x: width / 2 - (narrow ? 34 : 96), y: height / 2 - 38 };
    const place = (share, angle) => ({
      x: centre.x + Math.cos(angle) * (inner.x + (outer.x - inner.x) * share),
      y: centre.y + Math.sin(angle) * (inner.y + (outer.y - inner.y) * share),
    });
    const picture = draw("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": described(rows, count),
    });
    for (const ms of RINGS_MS) {
      const share = distance({ connected: true, rtt_ms: ms });
      const size = place(share, 0).x - centre.x;
      const high = place(share, Math.PI / 2).y - centre.y;
      picture.append(draw("ellipse", { class: "ring", cx: centre.x, cy: centre.y, rx: size, ry: high }));
      picture.append(draw("text", { class: "ring-label", x: centre.x, y: centre.y - high - 3, "text-anchor": "middle" }, `${ms} ms`));
    }
    const turn = (2 * Math.PI) / Math.max(1, rows.length);
    // the words of the rings and of this node stand above and below the middle: nobody begins there
    const first = rows.length % 2 === 0 ? (turn - Math.PI) / 2 : rows.length === 1 ? 0 : Math.PI;
    const at = rows.map((row, n) => place(distance(row), first + turn * n));
    rows.forEach((row, n) => picture.append(...this.link(centre, at[n], row)));
    rows.forEach((row, n) => picture.append(this.peer(at[n], row, colour, { narrow, crowded: rows.length > 10 })));
    const size = 17;
    const circle = draw("circle", { class: own.length ? `here m${colour.get(own[0])}` : "here", cx: centre.x, cy: centre.y, r: size });
    picture.append(circle);
    picture.append(draw("text", { class: "name", x: centre.x, y: centre.y + size + 16, "text-anchor": "middle" }, "this node"));
    const holds = own.length ? shorten(own.join(", "), 24) : "no model";
    picture.append(draw("text", { class: "rtt", x: centre.x, y: centre.y + size + 31, "text-anchor": "middle" }, holds));
    return picture;
  }

  link(from, to, row) {
    if (!row.connected) return [];
    const shapes = [draw("line", { class: row.relayed ? "link relayed" : "link", x1: from.x, y1: from.y, x2: to.x, y2: to.y })];
    const there = row.requests?.to_now || 0;
    const here = row.requests?.from_now || 0;
    if (there) shapes.push(...flow(from, to, "flow", there, there && here ? 5 : 0));
    if (here) shapes.push(...flow(to, from, "flow back", here, there && here ? 5 : 0));
    return shapes;
  }

  peer(at, row, colour, { narrow, crowded }) {
    const names = row.models.map((model) => model.name);
    const kind = names.length ? `peer m${colour.get(names[0])}` : "peer bare";
    const group = draw("g", {},
      draw("title", {}, [row.peer_id, names.join(", ") || "no model", row.connected ? milliseconds(row.rtt_ms) : "not connected"].join("\n")),
      draw("circle", { class: row.connected ? kind : `${kind} away`, cx: at.x, cy: at.y, r: crowded ? 8 : 11 }));
    if (crowded && (narrow || !(row.requests?.to_now || row.requests?.from_now))) return group;
    const under = (narrow ? 11 : 13) + 11;
    group.append(draw("text", { class: "name", x: at.x, y: at.y + under, "text-anchor": "middle" },
      narrow ? row.peer_id.slice(-6) : shortId(row.peer_id)));
    group.append(draw("text", { class: "rtt", x: at.x, y: at.y + under + 14, "text-anchor": "middle" },
      row.connected ? milliseconds(row.rtt_ms) + (row.relayed ? " relayed" : "") : "not connected"));
    return group;
  }

  explained(colour, rows) {
    const dot = (kind) => draw("svg", { width: 12, height: 12, "aria-hidden": "true" }, draw("circle", { class: kind, cx: 6, cy: 6, r: 5 }));
    const stroke = (kind) => draw("svg", { width: 26, height: 8, "aria-hidden": "true" }, draw("line", { class: kind, x1: 2, x2: 24, y1: 4, y2: 4 }));
    const told = [...colour].map(([name, n]) => make("span", {}, dot(`m${n}`), shorten(name, 28)));
    if (rows.some((row) => !row.models.length)) told.push(make("span", {}, dot("peer bare"), "no model"));
    if (rows.some((row) => row.connected && row.relayed)) told.push(make("span", {}, stroke("link relayed"), "through a relay"));
    if (rows.some((row) => row.requests?.to_now)) told.push(make("span", {}, stroke("flow"), "asked by this node now"));
    if (rows.some((row) => row.requests?.from_now)) told.push(make("span", {}, stroke("flow back"), "served here now"));
    if (rows.length) told.push(make("span", {}, "Farther out: a longer round trip"));
    return told;
  }
}

// A moving line, with how many requests it stands for; `aside` keeps two directions apart.
function flow(from, to, kind, requests, aside) {
  const length = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const way = { x: (to.x - from.x) / length, y: (to.y - from.y) / length };
  const off = { x: -way.y * aside, y: way.x * aside };
  const start = { x: from.x + way.x * 20 + off.x, y: from.y + way.y * 20 + off.y };
  const end = { x: to.x - way.x * 16 + off.x, y: to.y - way.y * 16 + off.y };
  const middle = { x: (start.x + end.x) / 2 - way.y * 13, y: (start.y + end.y) / 2 + way.x * 13 + 4 };
  return [
    draw("line", { class: kind, x1: start.x, y1: start.y, x2: end.x, y2: end.y }),
    draw("text", { class: "count", x: middle.x, y: middle.y, "text-anchor": "middle" }, String(requests)),
  ];
}

function described(rows, count) {
  if (!rows.length) return "This node alone: no peers yet";
  const there = rows.reduce((sum, row) => sum + (row.requests?.to_now || 0), 0);
  const here = rows.reduce((sum, row) => sum + (row.requests?.from_now || 0), 0);
  return `This node and ${plural(count, "peer")}; ${plural(there, "request")} go to peers and ${here} come from peers now. `
    + "The table of peers below has all of it.";
}
