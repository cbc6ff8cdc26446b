// Line charts with axes, drawn anew at each change: at the width they have, so that letters keep their size.

import { draw } from "./dom.js";
import { isNumber } from "./format.js";

const LEFT = 46;
const RIGHT = 8;
const TOP = 10;
const BOTTOM = 24;

// Ticks at 1, 2 or 5 times a power of ten: about `wanted` of them.
export function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n += 1) found.push(Number((n * step).toPrecision(12)));
  return { found, step };
}

export class Chart {
  // options: height, series: [{name, of: row -> number|null, kind: first|second}], x: {of, ticks(rows) -> [{at, text}]},
  // low: whether y begins at 0, unit, label(rows) for who does not see it, read(row) -> text at the pointer
  constructor(holder, options) {
    this.holder = holder;
    this.options = options;
    this.rows = [];
    this.at = null;
    new ResizeObserver(() => this.paint()).observe(holder);
    holder.addEventListener("pointermove", (event) => this.point(event));
    holder.addEventListener("pointerleave", () => { this.at = null; this.paint(); });
  }

  show(rows) {
    this.rows = rows;
    this.paint();
  }

  point(event) {
    const box = this.holder.getBoundingClientRect();
    this.at = event.clientX - box.left;
    this.paint();
  }

  bounds() {
    const { series, fromZero } = this.options;
    const values = this.rows.flatMap((row) => series.map((each) => each.of(row))).filter(isNumber);
    let low = fromZero || !values.length ? 0 : Math.min(...values);
    let high = values.length ? Math.max(...values) : 1;
    if (high <= low) high = low + (Math.abs(low) * 0.05 || 1);
    if (!fromZero) {
      const room = (high - low) * 0.08;
      low -= room;
      high += room;
    }
    const { found, step } = ticks(low, high, 4);
    if (fromZero) {
      high = Math.max(high, Math.ceil(high / step - 1e-9) * step);
      if (found.at(-1) < high) found.push(high);
    }
    return { low, high, found };
  }

  paint() {
    const width = Math.max(200, Math.floor(this.holder.clientWidth));
    const { height, series, x, label } = this.options;
    const { low, high, found } = this.bounds();
    const xs = this.rows.map(x.of);
    const [from, to] = x.range(this.rows);
    const across = (at) => LEFT + ((at - from) / (to - from || 1)) * (width - LEFT - RIGHT);
    const up = (value) => TOP + (1 - (value - low) / (high - low)) * (height - TOP - BOTTOM);
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label(this.rows) });
    for (const value of found) {
      const y = up(value);
      picture.append(
        draw("line", { class: value === 0 ? "base-line" : "grid-line", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
        draw("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, String(value)));
    }
    for (const { at, text } of x.ticks(from, to, width)) {
      const place = across(at);
      const anchor = place > width - 30 ? "end" : place < LEFT + 20 ? "start" : "middle";
      picture.append(draw("text", { x: place, y: height - 6, "text-anchor": anchor }, text));
    }
    for (const each of series) {
      picture.append(...this.line(each, xs.map(across), up, up(Math.max(low, 0))));
    }
    this.read(picture, xs.map(across), up, width);
    this.holder.replaceChildren(picture);
  }

  // Stretches without a value are gaps.
  line(each, places, up, base) {
    const runs = [];
    this.rows.forEach((row, n) => {
      const value = each.of(row);
      if (!isNumber(value)) return;
      const last = runs.at(-1);
      if (last && last.at(-1).n === n - 1) last.push({ n, value });
      else runs.push([{ n, value }]);
    });
    const shapes = [];
    for (const run of runs) {
      const points = run.map(({ n, value }) => `${places[n].toFixed(1)} ${up(value).toFixed(1)}`);
      if (each.kind === "first" && this.options.fromZero && run.length > 1) {
        const ends = `L${places[run.at(-1).n].toFixed(1)} ${base} L${places[run[0].n].toFixed(1)} ${base}Z`;
        shapes.push(draw("path", { class: "area", d: `M${points.join("L")}${ends}` }));
      }
      if (run.length > 1) shapes.push(draw("path", { class: `line ${each.kind}`, d: `M${points.join("L")}` }));
      if (this.options.dots || run.length === 1) {
        for (const { n, value } of run) shapes.push(draw("circle", { class: "dot", cx: places[n], cy: up(value), r: 3 }));
      }
    }
    return shapes;
  }

  read(picture, places, up, width) {
    if (this.at === null || !this.rows.length) return;
    let nearest = 0;
    places.forEach((place, n) => { if (Math.abs(place - this.at) < Math.abs(places[nearest] - this.at)) nearest = n; });
    const place = places[nearest];
    const row = this.rows[nearest];
    const value = this.options.series[0].of(row);
    picture.append(draw("line", { class: "cross", x1: place, x2: place, y1: TOP, y2: this.options.height - BOTTOM }));
    if (isNumber(value)) picture.append(draw("circle", { class: "dot", cx: place, cy: up(value), r: 4 }));
    const anchor = place > width * 0.6 ? "end" : "start";
    picture.append(draw("text", {
      class: "read", x: place + (anchor === "end" ? -8 : 8), y: TOP + 12, "text-anchor": anchor,
    }, this.options.read(row)));
  }
}
