// The panel of training: the loss by round, who is in, and what it costs.

import { Chart, ticks } from "./chart.js";
import { byId, make, show } from "./dom.js";
import { bytes, capital, count, isNumber, number, plural, shortId, time } from "./format.js";

const STATES = { idle: "plain", stopped: "bad", paused: "warn" };

export class TrainingPanel {
  constructor() {
    this.figures = make("div");
    this.curve = make("div", { class: "chart" });
    this.people = make("div");
    this.chart = null;
  }

  show({ training, rounds, node, load }) {
    const holder = byId("training");
    const state = training.paused ? "paused" : training.state;
    show(byId("training-state"), make("span", { class: `pill ${training.run ? STATES[state] ?? "good" : ""}` }, state));
    if (!training.run) {
      show(holder, make("p", { class: "empty" }, capital(training.problem || training.why) || [
        "This node is in no run. Begin one on text of yours, which never leaves this machine: ",
        make("code", {}, "python -m node train start NAME --data FOLDER"), ", or join one: ",
        make("code", {}, "python -m node train join NAME --data FOLDER"), "."]));
      return;
    }
    if (!this.figures.isConnected) holder.replaceChildren(this.figures, this.curve, this.people);
    this.numbers(training, rounds, load);
    this.loss(rounds);
    this.members(training, node);
  }

  numbers(training, rounds, load) {
    const last = rounds.at(-1);
    const blobs = load.blobs || {};
    const loss = training.held_out_loss ?? rounds.filter((each) => isNumber(each.loss)).at(-1)?.loss;
    const pair = (name, value, title) => make("div", { title: title || null }, make("dt", {}, name), make("dd", {}, value));
    show(this.figures, make("dl", { class: "figures" },
      pair("Run", training.run.name, training.run.id),
      pair("Round", count(training.round), training.phase ? `phase: ${training.phase}` : ""),
      pair("Loss, own text", isNumber(loss) ? `${loss.toFixed(3)} nats` : "–",
        "Held-out loss a token of the weights that the members agreed on"),
      pair("Contributors", last ? `${last.contributed} of ${training.members.length}` : plural(training.members.length, "member")),
      pair("A round takes", last ? time(training.round_s_median ?? last.seconds) : "–"),
      pair("Update", bytes(training.run.update_bytes_max), "At most so many bytes a member and round"),
      pair("Given / fetched", `${bytes(blobs.given)} / ${bytes(blobs.fetched)}`),
      pair("Tokens trained on", number(training.work?.tokens))),
    training.why ? make("p", { class: "muted small" }, `${capital(training.state)}: ${training.why}`) : null);
  }

  loss(rounds) {
    const rows = rounds.filter((each) => isNumber(each.loss));
    this.curve.hidden = rows.length < 2;
    if (this.curve.hidden) return;
    this.chart ??= new Chart(this.curve, {
      height: 190,
      fromZero: false,
      dots: true,
      series: [{ kind: "first", of: (row) => row.loss }],
      x: {
        of: (row) => row.round,
        range: (all) => [all[0]?.round ?? 0, all.at(-1)?.round ?? 1],
        ticks: (from, to, width) => ticks(from, to, width < 420 ? 4 : 8).found.filter(Number.isInteger)
          .map((at) => ({ at, text: at === from ? `round ${at}` : String(at) })),
      },
      label: (all) => `Held-out loss by round: ${all[0].loss.toFixed(3)} at round ${all[0].round}, `
        + `${all.at(-1).loss.toFixed(3)} at round ${all.at(-1).round}`,
      read: (row) => `round ${row.round}: ${row.loss.toFixed(4)} nats, ${row.contributed} in, ${time(row.seconds)}`,
    });
    this.chart.show(rows);
  }

  members(training, node) {
    const refused = Object.entries(training.refused || {});
    show(this.people,
      make("h3", {}, "Members"),
      make("ul", { class: "members" }, ...training.members.map((member) => {
        const own = member.peer_id === node.peer_id;
        const kind = own ? "own" : member.connected ? "" : "away";
        const missed = member.rounds_missed ? `, missed ${plural(member.rounds_missed, "round")}` : "";
        return make("li", { class: kind, title: `${member.peer_id}${member.votes ? ", votes" : ""}${missed}` },
          own ? "this node" : shortId(member.peer_id), missed);
      })),
      refused.length ? make("p", { class: "muted small" },
        `Refused: ${refused.map(([peer, why]) => `${shortId(peer)} (${why})`).join("; ")}`) : null);
  }
}
