// Asks the node for one answer and streams it; and the models that it may be asked for.

import { headers } from "./key.js";
import { events } from "./sse.js";

// An error in the node's words, and what to do about it.
export class Failed extends Error {
  constructor({ message, code = "", status = 0, advice = "", wait = 0 }) {
    super(message);
    Object.assign(this, { code, status, advice, wait });
  }
}

const ADVICE = {
  unknown_model: "Choose another model below: the list has what is served now.",
  no_room: "Everybody who serves this model is full. Try again in a moment, or choose another model.",
  too_many: "Wait for one of your answers to end, then try again.",
  not_ready: "Try again in a moment.",
  peer_failed: "The peer that answered is gone and no other could go on. Try again.",
  deadline: "Ask for fewer tokens, in the settings, or try again when the node has less to do.",
  too_large: "Begin a new chat, or shorten your message: the model reads only so much.",
  bad_request: "Change what the sentence names, in your message or in the settings.",
  internal: "This is a fault of the node. Its log says more under the request's id.",
};

function failure(error, status, wait) {
  if (status === 401) {
    return new Failed({ ...error, status, advice: "Put the key that the node's operator gave you into the settings, then try again." });
  }
  if (error.code === "unknown_model" && error.models?.length === 0) {
    return new Failed({ ...error, status, advice: "Nobody whom this node knows serves any model now." });
  }
  return new Failed({ message: error.message || `The node answered ${status}.`, code: error.code, status, wait,
    advice: ADVICE[error.code] || (error.retryable ? "Try again in a moment." : "") });
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failed({ message: "The node does not answer.", code: "unreachable",
      advice: "See that it runs (python -m node) and that this machine reaches it, then try again." });
  }
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error || {};
  } catch {
    // not the node's own words: a proxy's, perhaps
  }
  throw failure(error, response.status, Number(response.headers.get("retry-after")) || 0);
}

// Models that answer, as the whole network serves them.
export async function models() {
  const { data } = await (await asked("/v1/models", {})).json();
  return data.filter((model) => model.kind !== "encoder");
}

// Streams one answer. told({text}) for each piece, told({by, revision, model}) when it is known who answers.
// Returns {reason, usage}. Raises Failed, AbortError.
export async function complete(body, signal, told) {
  const response = await asked("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  told({ by: response.headers.get("x-served-by"), revision: response.headers.get("x-model-revision"),
    kept: response.headers.get("x-cache") === "hit" });
  const end = { reason: null, usage: null };
  let done = false;
  try {
    for await (const { event, data } of events(response)) {
      if (event === "error") throw failure(JSON.parse(data).error, 0, 0);
      if (data === "[DONE]") {
        done = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.usage) end.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) told({ text: choice.delta.content });
      if (choice?.finish_reason) end.reason = choice.finish_reason;
      if (chunk.model) told({ model: chunk.model });
    }
  } catch (error) {
    if (error instanceof Failed || error.name === "AbortError") throw error;
    done = false;
  }
  if (!done) {
    throw new Failed({ message: "The connection broke before the answer was complete.", code: "broken",
      advice: "What has come so far stands above. Try again." });
  }
  return end;
}
