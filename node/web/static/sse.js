// Reads server-sent events from a fetch, which unlike EventSource can send an API key.

// Yields {event, data, id}. Comments are skipped. Ends where the body ends; the caller's abort is thrown.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const event = parse(block);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it has ended already, or is aborted: there is nothing left to tell
  }
}

function parse(block) {
  const event = { event: "message", data: "", id: "" };
  const lines = [];
  for (const line of block.split(/\r?\n/)) {
    const colon = line.indexOf(":");
    if (colon === 0) continue;
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") lines.push(value);
    else if (name === "event" || name === "id") event[name] = value;
  }
  event.data = lines.join("\n");
  return lines.length ? event : null;
}
