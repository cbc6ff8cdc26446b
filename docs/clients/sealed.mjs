// Asks a model through any node so that only the peer that answers can read the prompt. Browsers and Node 20 or later;
// WebCrypto alone, nothing to install. Wire form: docs/PROTOCOLS.md, "Sealed requests". In short:
//
//   import { ask, peersWith } from "./sealed.mjs";
//   const [peer] = await peersWith("http://127.0.0.1:8765", "NAME");
//   for await (const part of ask("http://127.0.0.1:8765", peer, "/v1/chat/completions", { messages, stream: true })) ...
//
// node sealed.mjs URL "Once upon a time" [PEER_ID]
//
// The node that is asked lists the peers: name one that you have reason to trust. A peer that fails is an error here;
// who wants another asks again, from the beginning. docs/clients/sealed.py does so by itself.

const { subtle } = globalThis.crypto;
const SUITE_ID = hex("002000010001");
const [SALT, MORE, LAST, RELAY] = [0, 1, 2, 3];
const SKEW_MS = 60_000n;
const PAD_TO = 1024;
const BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

// --- bytes ---

function hex(text) {
  return Uint8Array.from(text.match(/../g), (pair) => parseInt(pair, 16));
}

function bytes(...parts) {
  const all = parts.map((part) => (typeof part === "string" ? new TextEncoder().encode(part) : part));
  const joined = new Uint8Array(all.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of all) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}

const u16 = (number) => Uint8Array.of(number >> 8, number & 255);
const lv = (part) => bytes(u16(bytes(part).length), part);
const same = (a, b) => a.length === b.length && a.every((byte, at) => byte === b[at]);
const base64 = (raw) => btoa(Array.from(raw, (byte) => String.fromCharCode(byte)).join(""));
const unbase64 = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));

// --- HPKE, RFC 9180: base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM ---

async function hmac(key, content) {
  const padded = key.length ? key : new Uint8Array(32);
  const imported = await subtle.importKey("raw", padded, { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  return new Uint8Array(await subtle.sign("HMAC", imported, content));
}

const extract = (suite, salt, label, ikm) => hmac(salt, bytes("HPKE-v1", suite, label, ikm));
const expand = async (suite, prk, label, info, size) =>
  (await hmac(prk, bytes(u16(size), "HPKE-v1", suite, label, info, Uint8Array.of(1)))).slice(0, size);

async function hpkeSeal(publicKey, info, plain) {
  const pair = await subtle.generateKey({ name: "X25519" }, false, ["deriveBits"]);
  const enc = new Uint8Array(await subtle.exportKey("raw", pair.publicKey));
  const theirs = await subtle.importKey("raw", publicKey, { name: "X25519" }, false, []);
  const dh = new Uint8Array(await subtle.deriveBits({ name: "X25519", public: theirs }, pair.privateKey, 256));
  const kem = bytes("KEM", u16(0x20));
  const shared = await expand(kem, await extract(kem, bytes(), "eae_prk", dh), "shared_secret", bytes(enc, publicKey), 32);
  const suite = bytes("HPKE", SUITE_ID);
  const ids = await extract(suite, bytes(), "psk_id_hash", bytes());
  const context = bytes(Uint8Array.of(0), ids, await extract(suite, bytes(), "info_hash", info));
  const secret = await extract(suite, shared, "secret", bytes());
  const key = await aead(await expand(suite, secret, "key", context, 16));
  const iv = await expand(suite, secret, "base_nonce", context, 12);
  return bytes(enc, new Uint8Array(await subtle.encrypt({ name: "AES-GCM", iv }, key, plain)));
}

const aead = (raw) => subtle.importKey("raw", raw, { name: "AES-GCM" }, false, ["encrypt", "decrypt"]);

// --- who a peer is, and its key ---

function publicKeyOf(peer) {
  let number = 0n;
  for (const char of peer) {
    const digit = BASE58.indexOf(char);
    if (digit < 0) throw new Error(`${peer} is no peer id`);
    number = number * 58n + BigInt(digit);
  }
  const raw = hex(number.toString(16).padStart(76, "0"));
  if (raw.length !== 38 || !same(raw.slice(0, 6), hex("002408011220"))) throw new Error(`${peer} is no Ed25519 peer id`);
  return raw.slice(6);
}

function elements(raw) {
  // the scalars of a msgpack array of less than 16: texts, bytes and unsigned integers
  const found = [];
  let at = 1;
  const take = (size) => raw.slice(at, (at += size));
  const number = (size) => take(size).reduce((sum, byte) => sum * 256n + BigInt(byte), 0n);
  for (let left = raw[0] - 0x90; left > 0; left--) {
    const tag = raw[at++];
    const width = { 0xc4: 1, 0xc5: 2, 0xd9: 1, 0xcc: 1, 0xcd: 2, 0xce: 4, 0xcf: 8 }[tag];
    if (tag < 0x80) found.push(BigInt(tag));
    else if (tag >= 0xcc && tag <= 0xcf) found.push(number(width));
    else if (tag === 0xc4 || tag === 0xc5) found.push(take(Number(number(width))));
    else found.push(new TextDecoder().decode(take(tag >= 0xa0 && tag < 0xc0 ? tag & 31 : Number(number(width ?? 1)))));
  }
  return found;
}

// The peer's sealing key and the network it is for. Throws unless this very peer signed it, for now.
export async function keyOf(statement, peer, nowMs = BigInt(Date.now())) {
  const sender = publicKeyOf(peer);
  const [version, domain, network, who, , madeMs, expiresMs, body, signature] = elements(statement);
  const isIts = statement[0] === 0x99 && version === 1n && domain === "sealing" && same(who, sender);
  const signed = bytes("openagi:sealing:", Uint8Array.of(0x98), statement.slice(1, -66));
  const key = await subtle.importKey("raw", sender, { name: "Ed25519" }, false, ["verify"]);
  if (!isIts || !(await subtle.verify("Ed25519", key, signature, signed)))
    throw new Error("the key was not signed by the peer that it is said to be of");
  if (nowMs < madeMs - SKEW_MS || nowMs > expiresMs + SKEW_MS)
    throw new Error("the key's time is over or has not come: is this machine's clock right?");
  if (body.length !== 38 || !same(body.slice(0, 6), SUITE_ID)) throw new Error("the key is for another suite");
  return { publicKey: body.slice(6), network };
}

// --- one sealed request ---

export class Request {
  static async to(peer, statement, path, body) {
    const request = new Request();
    const { publicKey, network } = await keyOf(statement, peer);
    const [id, secret] = [16, 32].map((size) => globalThis.crypto.getRandomValues(new Uint8Array(size)));
    request.context = bytes(lv(network), lv(peer), lv(id));
    const text = bytes(JSON.stringify({ path, body }));
    const padding = new Uint8Array((PAD_TO - (text.length % PAD_TO)) % PAD_TO).fill(32);
    const info = bytes(lv("openagi:sealed:1:request"), request.context);
    const sealed = await hpkeSeal(publicKey, info, bytes(secret, text, padding));
    request.json = { peer, key: base64(publicKey), request_id: base64(id), sealed: base64(sealed) };
    return Object.assign(request, { secret, count: 0, isWhole: false, key: null });
  }

  // The content of the next frame. Throws when it was changed, left out, repeated or moved.
  async open(frame) {
    if (this.isWhole) throw new Error("something came after the last frame");
    if (frame[0] === SALT && this.key === null) {
      const info = bytes(lv("openagi:sealed:1:answer"), this.context);
      const base = await subtle.importKey("raw", this.secret, "HKDF", false, ["deriveBits"]);
      const params = { name: "HKDF", hash: "SHA-256", salt: frame.slice(1), info };
      this.key = await aead(new Uint8Array(await subtle.deriveBits(params, base, 128)));
      return bytes();
    }
    if (this.key === null || (frame[0] !== MORE && frame[0] !== LAST)) throw new Error("a frame came out of turn");
    const iv = new Uint8Array(12);
    new DataView(iv.buffer).setUint32(8, this.count++);
    const params = { name: "AES-GCM", iv, additionalData: frame.slice(0, 1) };
    const plain = new Uint8Array(await subtle.decrypt(params, this.key, frame.slice(1)));
    this.isWhole = frame[0] === LAST;
    return plain.slice(4, 4 + new DataView(plain.buffer).getUint32(0));
  }
}

// --- the node in between ---

async function told(response) {
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  return body;
}

const json = async (url) => told(await fetch(url));

export async function peersWith(node, model) {
  const { peers } = await json(`${node}/api/v1/peers`);
  const fits = (one) => one.kind === "causal" && (!model || one.name === model);
  const found = peers.filter((row) => row.models.some(fits));
  return found.sort((a, b) => (b.slots_free ?? 0) - (a.slots_free ?? 0)).map((row) => row.peer_id);
}

async function* frames(stream) {
  let kept = bytes();
  for await (const part of stream) {
    kept = bytes(kept, part);
    while (kept.length >= 4) {
      const size = new DataView(kept.buffer).getUint32(0);
      if (kept.length < 4 + size) break;
      const frame = kept.slice(4, 4 + size);
      kept = kept.slice(4 + size);
      if (size > 0) yield frame; // 0: a sign of life
    }
  }
}

async function* parts(body) {
  // Safari and older browsers cannot iterate over a body
  const reader = body.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    await reader.cancel(); // whoever leaves early cancels the request
  }
}

// The body of the answer as it comes, as bytes. Throws for any error, also the peer's own, and when it is not whole.
export async function* ask(node, peer, path, body) {
  let statement = unbase64((await json(`${node}/api/v1/peers/${peer}/sealing-key`)).statement);
  for (let tries = 1; ; tries++) {
    const request = await Request.to(peer, statement, path, body);
    const headers = { "content-type": "application/json" };
    const response = await fetch(`${node}/api/v1/sealed`, { method: "POST", headers, body: JSON.stringify(request.json) });
    if (response.status === 409 && tries === 1) {
      const { sealing_key: key } = await response.json();
      if (key) statement = unbase64(key); // the peer has another by now
      continue;
    }
    if (!response.ok) await told(response);
    yield* opened(request, response.body);
    return;
  }
}

async function* opened(request, body) {
  let head = null;
  let failed = "";
  for await (const frame of frames(parts(body))) {
    if (frame[0] === RELAY) throw new Error(JSON.parse(new TextDecoder().decode(frame.slice(1))).error.message);
    const content = await request.open(frame);
    if (frame[0] === SALT) continue;
    if (head === null) head = JSON.parse(new TextDecoder().decode(content));
    else if (head.status === 200) yield content;
    else failed += new TextDecoder().decode(content);
  }
  if (!request.isWhole) throw new Error("the answer was cut before its last frame");
  if (head.status !== 200) throw new Error(JSON.parse(failed).error.message);
}

if (typeof process !== "undefined" && process.argv[1] && import.meta.url.endsWith(process.argv[1].split("/").pop())) {
  const [node, prompt, chosen] = process.argv.slice(2);
  const peer = chosen ?? (await peersWith(node))[0];
  if (!peer) throw new Error("no peer that makes text is known there");
  let text = "";
  const body = { messages: [{ role: "user", content: prompt }], max_tokens: 64, seed: 1 };
  for await (const part of ask(node, peer, "/v1/chat/completions", body)) text += new TextDecoder().decode(part);
  console.log(JSON.parse(text).choices[0].message.content);
}
