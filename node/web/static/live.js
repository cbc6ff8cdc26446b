// Follows /api/v1/events: keeps the last of each section, and says when something has changed. Connects again by itself.

import { ask, headers } from "./key.js";
import { events } from "./sse.js";

const AGAIN_MS_MIN = 1000;
const AGAIN_MS_MAX = 15000;
const SAMPLES_MAX = 150; // as node/recent.py

// told(state, changed names); said(kind, sentence) for the connection itself. Never returns.
export async function follow(dialog, told, said) {
  const state = { history: [] };
  let wait = AGAIN_MS_MIN;
  for (;;) {
    try {
      const response = await fetch("/api/v1/events", { headers: headers(), cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        said("warn", "wants a key");
        await ask(dialog, await sentence(response));
        continue;
      }
      if (!response.ok) throw new Error(await sentence(response));
      said("good", "live");
      wait = AGAIN_MS_MIN;
      for await (const event of events(response)) {
        if (event.event === "end") throw new Error("the node is stopping");
        told(state, take(state, JSON.parse(event.data)));
      }
      throw new Error("the node closed the connection");
    } catch (error) {
      const why = error instanceof TypeError ? "the node does not answer" : error.message;
      said("bad", why);
      await new Promise((resume) => { setTimeout(resume, wait); });
      said("warn", "connecting");
      wait = Math.min(wait * 2, AGAIN_MS_MAX);
    }
  }
}

async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the node answered ${response.status}`;
  }
}

function take(state, fresh) {
  const changed = new Set(Object.keys(fresh));
  if ("uptime_s" in fresh) state.started = Date.now() - fresh.uptime_s * 1000;
  Object.assign(state, fresh);
  const sample = fresh.sample;
  const last = state.history.at(-1);
  if (sample && !("history" in fresh) && (!last || sample.number > last.number)) {
    state.history.push(sample);
    state.history.splice(0, state.history.length - SAMPLES_MAX);
    changed.add("history");
  }
  return changed;
}
