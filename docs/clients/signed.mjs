// Sign a request for any node of the network: no API key, no account, only an Ed25519 key of your own.
//
// A node accepts it once, within a minute, and no other node does: the signature covers method, path, query, body and
// the peer id of the node that is asked. RFC 9421 (HTTP message signatures), RFC 9530 (Content-Digest). Needs nothing
// but WebCrypto with Ed25519 and fetch: Node 20 or newer, Deno, and browsers of 2025.
//
//     node signed.mjs http://127.0.0.1:8765 12D3KooW... "Once upon a time"
//
// In a page: `import { makeKey, signedHeaders } from "./signed.mjs"`, and start the node with `--origins` of the page.

const LIFE_S = 30; // a node takes at most 60
const COVERED = '("@method" "@path" "@query" "content-digest" "x-audience")';

const base64 = (bytes) => btoa(String.fromCharCode(...bytes));
const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** A new key pair; keep it (IndexedDB holds it as it is), for it is who you are. */
export async function makeKey() {
  return crypto.subtle.generateKey({ name: "Ed25519" }, false, ["sign", "verify"]);
}

/**
 * The headers that make this request a signed one.
 *
 * key: a pair as makeKey gives it. audience: the peer id of the node that the request goes to. body: the very bytes
 * that are sent, a string or a Uint8Array ("" for none). Send the request with these headers within LIFE_S seconds,
 * once: sign a repetition anew.
 */
export async function signedHeaders(key, method, url, body, audience, now = Date.now() / 1000) {
  const encoder = new TextEncoder();
  const { pathname, search } = new URL(url);
  const created = Math.floor(now);
  const bytes = typeof body === "string" ? encoder.encode(body) : body;
  const keyid = hex(new Uint8Array(await crypto.subtle.exportKey("raw", key.publicKey)));
  const digest = `sha-256=:${base64(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)))}:`;
  const nonce = hex(crypto.getRandomValues(new Uint8Array(16)));
  const covered =
    `${COVERED};created=${created};expires=${created + LIFE_S}` + `;nonce="${nonce}";keyid="${keyid}";alg="ed25519"`;
  const base = [
    `"@method": ${method.toUpperCase()}`,
    `"@path": ${pathname}`,
    `"@query": ?${search.slice(1)}`,
    `"content-digest": ${digest}`,
    `"x-audience": ${audience}`,
    `"@signature-params": ${covered}`,
  ].join("\n");
  const signature = new Uint8Array(await crypto.subtle.sign("Ed25519", key.privateKey, encoder.encode(base)));
  return {
    "content-digest": digest,
    "x-audience": audience,
    "signature-input": `sig1=${covered}`,
    signature: `sig1=:${base64(signature)}:`,
  };
}

if (globalThis.process?.argv[1]?.endsWith("signed.mjs")) {
  const [, , node, audience, text] = process.argv;
  if (text === undefined) {
    console.error("usage: node signed.mjs URL PEER_ID TEXT");
    process.exit(2);
  }
  const url = `${node.replace(/\/$/, "")}/v1/completions`;
  const body = JSON.stringify({ prompt: text, max_tokens: 32 });
  const headers = await signedHeaders(await makeKey(), "POST", url, body, audience);
  const response = await fetch(url, { method: "POST", body, headers: { "content-type": "application/json", ...headers } });
  const told = await response.json();
  if (!response.ok) {
    console.error(`${response.status}: ${told.error.message}`);
    process.exit(1);
  }
  console.log(told.choices[0].text);
}
