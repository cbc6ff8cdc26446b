// A client of OpenAGI nodes over js-libp2p, written from docs/PROTOCOLS.md alone: envelopes, frames, rpc.
import { createHash } from 'node:crypto'
import { generateKeyPair, publicKeyFromRaw } from '@libp2p/crypto/keys'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { peerIdFromPublicKey } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { Decoder, Encoder } from '@msgpack/msgpack'
import { createLibp2p } from 'libp2p'

export const RPC = '/openagi/rpc/1'
export const INFER = '/openagi/infer/1'
export const ADVERTS = '/openagi/adverts/1'
const FRAME_BYTES_MAX = 1_048_576
const WINDOW = 256 // units of credit
const UNIT_BYTES = 1024
const SKEW_MS = 60_000n

export async function openPeer () {
  return createLibp2p({
    privateKey: await generateKeyPair('Ed25519'),
    addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    services: { identify: identify(), ping: ping(), pubsub: gossipsub({ allowPublishToZeroTopicPeers: true }) }
  })
}

export const advertTopic = network => `openagi/1/${network}/advert`

// ---- canonical msgpack ----

const encoder = new Encoder({ sortKeys: true, useBigInt64: true })
const plain = new Decoder()
const exact = new Decoder({ useBigInt64: true }) // 64-bit integers as BigInt: their bytes can be made again

export const encode = value => encoder.encode(value)
export const decode = raw => plain.decode(raw)

// ---- envelopes ----

const LABEL = /^[a-z0-9][a-z0-9._-]{0,63}$/

/** The statement in these bytes, checked in the order that the document gives. Throws for any other bytes. */
export async function openEnvelope (raw, domain, network) {
  if (raw.length > 4096) throw new Error('an envelope over 4,096 bytes')
  const fields = exact.decode(raw)
  if (!Array.isArray(fields) || fields.length !== 9) throw new Error('not an array of nine')
  if (!Buffer.from(encode(fields)).equals(Buffer.from(raw))) throw new Error('not canonical')
  const [v, itsDomain, itsNetwork, sender, sequence, timeMs, expiresMs, body, signature] = fields
  if (v !== 1) throw new Error(`version ${v}`)
  if (!LABEL.test(itsDomain) || !LABEL.test(itsNetwork)) throw new Error('a bad label')
  if (sender.length !== 32 || signature.length !== 64) throw new Error('a key or signature of another length')
  const lifetime = BigInt(expiresMs) - BigInt(timeMs)
  if (lifetime < 1n || lifetime > 30n * 86_400_000n) throw new Error(`a lifetime of ${lifetime} ms`)
  if (itsNetwork !== network || itsDomain !== domain) throw new Error(`for ${itsNetwork} ${itsDomain}`)
  const now = BigInt(Date.now())
  if (BigInt(timeMs) > now + SKEW_MS || BigInt(expiresMs) < now - SKEW_MS) throw new Error('not of now')
  const signed = Buffer.concat([Buffer.from(`openagi:${domain}:`), encode(fields.slice(0, 8))])
  const key = publicKeyFromRaw(sender)
  if (!await key.verify(signed, signature)) throw new Error('not signed by its sender')
  return { sender: peerIdFromPublicKey(key).toString(), sequence: BigInt(sequence), timeMs: BigInt(timeMs), body: plain.decode(body) }
}

// ---- frames ----

/** The frames of a stream, in order. Throws when one is too large or cut. */
export async function * frames (stream) {
  let held = Buffer.alloc(0)
  for await (const chunk of stream) {
    held = Buffer.concat([held, chunk.subarray()])
    while (held.length >= 4) {
      const size = held.readUInt32BE(0)
      if (size > FRAME_BYTES_MAX) throw new Error(`a frame of ${size} bytes`)
      if (held.length < 4 + size) break
      yield held.subarray(4, 4 + size)
      held = held.subarray(4 + size)
    }
  }
  if (held.length > 0) throw new Error('the stream ended inside a frame')
}

/** Send one frame; waits while the stream's window is closed. */
export async function sendFrame (stream, content) {
  const head = Buffer.alloc(4)
  head.writeUInt32BE(content.length)
  if (!stream.send(Buffer.concat([head, content]))) await stream.onDrain()
}

// ---- rpc ----

const units = bytes => Math.ceil(bytes / UNIT_BYTES)

/** Calls to one peer over one stream. */
export class Calls {
  #stream
  #last = 0
  #waiting = new Map() // id -> called with each frame of the call

  constructor (stream) {
    this.#stream = stream
    this.#read().catch(error => { for (const take of this.#waiting.values()) take(['error', 0, 'broken', String(error), true]) })
  }

  async #read () {
    for await (const raw of frames(this.#stream)) {
      const frame = decode(raw)
      this.#waiting.get(frame[1])?.(frame, raw.length)
    }
    throw new Error('the stream ended')
  }

  /** Begin a call: its items by `for await`, then `result`; `cancel()`. Gives back credit for what was read. */
  async begin (method, body) {
    const id = ++this.#last
    const arrived = []
    let wake = () => {}
    this.#waiting.set(id, (frame, bytes) => { arrived.push([frame, bytes]); wake() })
    const call = { id, result: undefined, cancel: () => this.#send(['cancel', id]) }
    call.unreadUnits = () => arrived.reduce((sum, [frame, bytes]) => sum + (frame[0] === 'item' ? units(bytes) : 0), 0)
    call[Symbol.asyncIterator] = () => this.#items(call, arrived, () => new Promise(resolve => { wake = resolve }))
    await this.#send(['call', id, method, body])
    return call
  }

  async * #items (call, arrived, more) {
    let freed = 0
    while (true) {
      if (arrived.length === 0) await more()
      const [[kind, , ...fields], bytes] = arrived.shift()
      if (kind === 'item') {
        yield fields[0]
        freed += units(bytes)
        if (freed >= WINDOW / 2) {
          await this.#send(['credit', call.id, freed])
          freed = 0
        }
        continue
      }
      this.#waiting.delete(call.id)
      if (kind === 'error') throw Object.assign(new Error(fields[1]), { code: fields[0], retryable: fields[2] })
      call.result = fields[0]
      return
    }
  }

  /** A call without items: its result. */
  async call (method, body) {
    const call = await this.begin(method, body)
    for await (const item of call) throw new Error(`an item came: ${JSON.stringify(item)}`)
    return call.result
  }

  async #send (frame) {
    await sendFrame(this.#stream, encode(frame))
  }
}

export const openCalls = async (connection, protocol) => new Calls(await connection.newStream(protocol))

/** Answer calls on `protocol` by `handlers`: method -> (body, who) => result. */
export async function serveCalls (peer, protocol, handlers) {
  await peer.handle(protocol, async (stream, connection) => {
    for await (const raw of frames(stream)) {
      const [kind, id, method, body] = decode(raw)
      if (kind !== 'call') continue
      const answer = handlers[method]
      await sendFrame(stream, encode(answer == null
        ? ['error', id, 'unknown_method', `there is no ${method}`, false]
        : ['end', id, answer(body, connection.remotePeer.toString())]))
    }
  })
}

export function hello (peer, network, instance) {
  return {
    protocol: 1,
    network,
    agent: 'interop-js/1',
    instance,
    addresses: peer.getMultiaddrs().map(String),
    seen_at: '',
    refused: '',
    twin: ''
  }
}

export const sha256 = data => createHash('sha256').update(data).digest('hex')
