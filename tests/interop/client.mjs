// What tests/interop/test_js.py runs: `node client.mjs talk ADDRESS NETWORK | bulk ADDRESS BYTES | listen NETWORK`.
// Each fact that it found is one line of JSON on stdout. `listen` goes on until its stdin ends.
import './polyfill.mjs'
import { randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'
import { multiaddr } from '@multiformats/multiaddr'
import {
  ADVERTS, INFER, RPC, advertTopic, frames, hello, openCalls, openEnvelope, openPeer, sendFrame, serveCalls, sha256
} from './openagi.mjs'

const BULK = '/openagi/test/bulk/1' // frames, and the same frames back
const BULK_FRAME_BYTES = 1_000_000
const say = (fact, value) => console.log(JSON.stringify({ fact, ...value }))
const instance = randomBytes(16).toString('hex')
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))

async function talk (address, network) {
  const peer = await openPeer()
  const heard = nextAdvert(peer, network)
  const identified = new Promise(resolve => peer.addEventListener('peer:identify', event => resolve(event.detail), { once: true }))
  const connection = await peer.dial(multiaddr(address))
  const known = await identified
  say('identify', { agent: known.agentVersion, protocols: known.protocols, peer: known.peerId.toString() })
  say('ping', { ms: await peer.services.ping.ping(connection.remotePeer) })

  const control = await openCalls(connection, RPC)
  say('hello', await control.call('hello', hello(peer, network, instance)))
  say('peers', await control.call('peers', {}))
  say('unknown', await control.call('nothing', {}).catch(error => ({ code: error.code, retryable: error.retryable })))

  say('gossip', await heard)
  const question = await connection.newStream(ADVERTS)
  const adverts = allAdverts(question, network) // reads from this moment on: js-libp2p drops what comes before
  await question.close() // our direction; theirs goes on
  say('adverts', { senders: (await adverts).map(advert => advert.sender), capacity: (await adverts)[0].body.capacity })

  const infer = await openCalls(connection, INFER)
  say('generate', await generate(infer, 600, true))
  say('cancel', await cancelled(infer))
  say('after cancel', await generate(infer, 8, false))
  const [embedded, wrong] = [
    await infer.call('embed', { type: 'embed', request_id: 'e', model: null, texts: ['a fox', new Uint8Array(Uint32Array.of(1, 2, 3).buffer)], remaining_ms: 60_000 }),
    await infer.call('generate', { type: 'generate', request_id: 'w', nonsense: 1 }).catch(error => ({ code: error.code }))
  ]
  say('embed', { dimensions: embedded.dimensions, bytes: embedded.vectors.map(vector => vector.length) })
  say('wrong', wrong)
  await peer.stop()
}

async function allAdverts (stream, network) {
  const found = []
  for await (const raw of frames(stream)) found.push(await openEnvelope(raw, 'advert', network))
  return found
}

/** The first advert on the topic, verified. */
function nextAdvert (peer, network) {
  const { promise, resolve } = Promise.withResolvers()
  peer.services.pubsub.addEventListener('message', async ({ detail }) => {
    if (detail.topic !== advertTopic(network)) return
    const { sender, sequence, body } = await openEnvelope(detail.data, 'advert', network)
    const changed = Uint8Array.from(detail.data)
    changed[changed.length - 1] ^= 1
    const refused = await openEnvelope(changed, 'advert', network).then(() => '', error => error.message)
    resolve({ sender, sequence: sequence.toString(), publisher: detail.from.toString(), body, changedIsRefused: refused })
  })
  peer.services.pubsub.subscribe(advertTopic(network))
  return promise
}

const work = tokens => ({
  type: 'generate',
  request_id: randomBytes(8).toString('hex'),
  model: null,
  revision: null,
  messages: null,
  text: 'Once upon a time there was a king who had three daughters',
  tokens: null,
  sampling: {
    max_tokens: tokens, temperature: 0, top_k: 0, top_p: 1, min_p: 0, frequency_penalty: 0, presence_penalty: 0,
    repetition_penalty: 1, seed: 0, stop: [], logprobs: null
  },
  delivered: new Uint8Array(0),
  delivered_chars: 0,
  remaining_ms: 120_000
})

/** One answer; a lazy reader stops after the first token until the callee has used all of its credit. */
async function generate (infer, tokens, lazy) {
  const call = await infer.begin('generate', work(tokens))
  const types = {}
  let text = ''
  let count = 0
  let first
  let unread = 0
  for await (const item of call) {
    first ??= item
    types[item.type] = (types[item.type] ?? 0) + 1
    if (item.type !== 'piece') continue
    text += item.text
    count += item.tokens.length
    if (lazy && unread === 0) {
      for (let turn = 0; turn < 600 && call.unreadUnits() < 254; turn++) await sleep(100)
      await sleep(1000)
      unread = call.unreadUnits()
    }
  }
  return { first, types, text, tokens: count, end: call.result, unread }
}

async function cancelled (infer) {
  const call = await infer.begin('generate', work(1000))
  let pieces = 0
  try {
    for await (const item of call) if (item.type === 'piece' && ++pieces === 3) await call.cancel()
  } catch (error) {
    return { pieces, code: error.code }
  }
  return { pieces, code: 'it ended' }
}

/** Send BYTES in frames and read them back, both at once. */
async function bulk (address, bytes) {
  const peer = await openPeer()
  const connection = await peer.dial(multiaddr(address))
  const stream = await connection.newStream(BULK)
  const content = randomBytes(Number(bytes))
  const began = Date.now()
  const sending = (async () => {
    for (let at = 0; at < content.length; at += BULK_FRAME_BYTES) await sendFrame(stream, content.subarray(at, at + BULK_FRAME_BYTES))
    await stream.close()
  })()
  const back = []
  for await (const frame of frames(stream)) back.push(Buffer.from(frame))
  await sending
  const ms = Date.now() - began
  const same = Buffer.concat(back).equals(content)
  say('bulk', { same, frames: back.length, ms, pingMs: await peer.services.ping.ping(connection.remotePeer) })
  await peer.stop()
}

/** Be a peer that others dial: answers hello, ping and bulk; each line on stdin publishes so many messages of noise. */
async function listen (network) {
  const peer = await openPeer()
  peer.addEventListener('peer:connect', ({ detail }) => say('connected', { peer: detail.toString() }))
  await serveCalls(peer, RPC, {
    hello: (body, who) => { say('hello', { who, body }); return hello(peer, network, instance) },
    ping: () => { say('ping', {}); return { instance, twin: '' } },
    peers: () => ({ peers: [] })
  })
  await peer.handle(BULK, async stream => {
    const back = []
    for await (const frame of frames(stream)) back.push(Buffer.from(frame))
    for (const frame of back) await sendFrame(stream, frame)
    say('bulk', { frames: back.length, digest: sha256(Buffer.concat(back)) })
    await stream.close()
  })
  peer.services.pubsub.subscribe(advertTopic(network))
  say('listening', { address: String(peer.getMultiaddrs()[0]), peer: peer.peerId.toString() })
  for await (const line of createInterface({ input: process.stdin })) {
    let reached = 0
    for (let n = 0; n < Number(line); n++) {
      const noise = randomBytes(1 + n % 3000)
      const { recipients } = await peer.services.pubsub.publish(advertTopic(network), noise)
      reached += recipients.length
    }
    say('published', { reached })
  }
  await peer.stop()
}

const [command, ...rest] = process.argv.slice(2)
await { talk, bulk, listen }[command](...rest)
