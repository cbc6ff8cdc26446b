"""Frames of every protocol of a node, well-formed and then damaged, for tests/test_fuzz_host.py.

Rules: all chance comes from `rng`. Bodies are damaged as values, so that they pass the decoder and reach the handlers;
now and then a frame is damaged as bytes. `Frames.count` is how many the host takes before it may end the stream.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack
from google.protobuf.message import DecodeError
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils import encode_varint_prefixed

from crypto import canonical
from crypto.digest import digest
from crypto.envelope import seal
from crypto.errors import BadEncoding
from crypto.identity import Identity
from gossip.messages import ADVERT_DOMAIN, Advert, Capacity, ModelKind, ModelOffer
from gossip.round_door import ROUND_LIMITS, ROUND_PROTOCOL
from gossip.rounds import Body, Contribution, Header, Precommit, Prevote, Proposal, Report, round_topic, sign_statement
from gossip.service import ADVERTS_PROTOCOL
from node.inference import INFER_PROTOCOL
from node.work import WORK_LIMITS, EmbedWork, GenerateWork, Message, Sampling, to_wire
from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.frame import encode_frame
from p2p.hello import RPC_PROTOCOL
from p2p.rpc import CALLS_MAX, Call, Cancel, Credit, Role, Rpc
from p2p.rpc import encode_frame as encode_rpc
from tests import fuzz_bulk, fuzz_relay
from tests.fuzz.damage import damaged, odd_value

MESHSUB = "/meshsub/1.1.0"
PING = "/ipfs/ping/1.0.0"
PUSH = "/ipfs/id/push/1.0.0"
IDENTIFY = "/ipfs/id/1.0.0"
FRAMES_PER_STREAM = 64
RUN, RUN_BASE = digest(b"the run of tests/fuzz_victim.py"), digest(b"and where it begins")


@dataclass(frozen=True, slots=True)
class Frames:
    """The bytes of some frames for one stream."""

    raw: bytes
    count: int


class Attacker:
    """A stranger's keys, and what it can say with them."""

    def __init__(self, rng: random.Random, network: str, topic: str) -> None:
        self.rng = rng
        self.identity = Identity(rng.randbytes(32))
        self.key_pair: KeyPair = create_new_key_pair(self.identity.seed)
        self.others: list[bytes] = []  # ids of other attackers
        self._network = network
        self._topic = topic
        self._sequence = time.time_ns() // 1_000_000

    def frames(self, protocol: str) -> Frames:
        """For a stream that we open."""
        rng = self.rng
        match protocol:
            case "/meshsub/1.1.0":
                raw = bytearray()
                for count in range(1, FRAMES_PER_STREAM + 1):
                    frame = self._gossip()
                    raw += encode_varint_prefixed(frame)
                    if not _decodes(frame):
                        return Frames(bytes(raw), count)  # the host ends the stream here
                return Frames(bytes(raw), FRAMES_PER_STREAM)
            case "/ipfs/ping/1.0.0":
                pings = [damaged(self.rng, rng.randbytes(32)) for _ in range(FRAMES_PER_STREAM)]
                return Frames(b"".join(pings), len(pings))
            case "/ipfs/id/push/1.0.0" | "/ipfs/id/1.0.0":
                return self.identify()
            case "/openagi/adverts/1":
                return self.adverts()
            case "/openagi/find/1":
                return _joined(fuzz_bulk.find(rng))
            case "/openagi/blob/1":
                frames = fuzz_bulk.asks(rng)
                return Frames(b"".join(frames), fuzz_bulk.taken(frames))
            case "/openagi/direct/1":
                return Frames(b"".join(fuzz_bulk.agreement(rng)), 2)
            case "/libp2p/circuit/relay/0.2.0/hop":
                return Frames(fuzz_relay.hop(rng, self.others), 1)
            case "/libp2p/circuit/relay/0.2.0/stop":
                return Frames(fuzz_relay.stop(rng, rng.choice(self.others)), 1)
            case "/libp2p/dcutr":
                return Frames(*fuzz_relay.punch(rng))
            case _:
                return self._calls(protocol)

    def answer(self, protocol: str) -> Frames:
        """For a stream that the host opens to us."""
        rng = self.rng
        match protocol:
            case "/ipfs/id/1.0.0":
                return self.identify()
            case "/openagi/adverts/1" | "/openagi/find/1":
                return self.adverts()
            case "/openagi/direct/1":
                return Frames(fuzz_bulk.offer(rng), 1)
            case "/libp2p/circuit/relay/0.2.0/hop":
                return Frames(fuzz_relay.place(rng), 1)
            case "/libp2p/circuit/relay/0.2.0/stop":
                return Frames(fuzz_relay.taken(rng), 1)
            case "/libp2p/dcutr":
                return Frames(*fuzz_relay.punch(rng))
            case "/openagi/round/1":
                return self.answers(self._handed)
            case _:
                return self.answers(_answer_of)

    def identify(self) -> Frames:
        """An identify message with anything in its fields."""
        rng = self.rng
        message = Identify(
            protocol_version="ipfs/0.1.0",
            agent_version="".join(self._words(1, 100)),
            public_key=rng.randbytes(36),
            listen_addrs=[rng.randbytes(rng.randint(0, 40)) for _ in range(rng.randint(0, 30))],
            observed_addr=rng.randbytes(8),
            protocols=[*self._words(30, 40), RPC_PROTOCOL, INFER_PROTOCOL, ADVERTS_PROTOCOL],
        )
        return Frames(encode_varint_prefixed(damaged(self.rng, bytes(message.SerializeToString()))), 1)

    def adverts(self) -> Frames:
        """What one peer hands to another that asks: envelopes, most of them properly signed."""
        frames = [self._advert() for _ in range(self.rng.randint(1, FRAMES_PER_STREAM))]
        raw = b"".join(map(encode_frame, frames))
        return Frames(raw if self.rng.random() < 0.7 else self._damaged_end(raw), len(frames))

    def _handed(self, rng: random.Random) -> Any:
        """What the host may be handed of a run."""
        record = {"manifest": rng.randbytes(rng.randint(0, 300)), "votes": [self._statement()]}
        return rng.choice(
            [
                {"record": None, "statement": self._statement()},
                {"record": canonical.encode(record), "statement": None},
                {"round": rng.choice([0, 1, 1 << 40])},
            ]
        )

    def answers(self, right: Callable[[random.Random], Any]) -> Frames:
        """What a callee says, unasked and in any order: ends, errors, items."""
        rng, raw = self.rng, bytearray()
        count = rng.randint(1, 8)
        for _ in range(count):
            number = rng.choice([1, 1, 1, 2, 3, 0, 2**53])
            body = right(rng) if rng.random() < 0.3 else self._odd_value(right(rng))
            fields = rng.choice([["end", number, body], ["item", number, body], ["error", number, "busy", "x", True]])
            raw += encode_frame(self._packed(fields if rng.random() < 0.8 else self._odd_value(fields)))
        return Frames(bytes(raw) if rng.random() < 0.7 else self._damaged_end(bytes(raw)), count)

    # -- calls --------------------------------------------------------------------------------------------------

    def _calls(self, protocol: str) -> Frames:
        """Frames of a caller: whatever the automaton allows with bodies of any kind, then perhaps one that it forbids.

        `model` is the host's own automaton, here to know which frame ends the stream.
        """
        rng, raw, model = self.rng, bytearray(), Rpc(Role.CALLEE, _LIMITS[protocol])
        count, last_id = 0, 0
        for count in range(1, rng.randint(1, FRAMES_PER_STREAM) + 1):
            kind = rng.random()
            if kind < 0.9 or not last_id:
                last_id += rng.choice([1, 1, 1, 1, 2, 1000])
                frame = self._call(protocol, last_id)
            elif kind < 0.99:
                frame = encode_rpc(Cancel(rng.randint(1, last_id)))
            else:
                frame = self._odd_frame(last_id)
            raw += encode_frame(frame)
            try:
                model.receive(frame)
            except RemoteProtocolError:
                return Frames(bytes(raw), count)
        assert model.unfinished <= CALLS_MAX
        return Frames(bytes(raw) if rng.random() < 0.8 else self._damaged_end(bytes(raw)), count)

    def _call(self, protocol: str, number: int) -> bytes:
        rng = self.rng
        methods = _BODIES[protocol]
        method = rng.choice([*methods, *methods, "nothing"])
        body = _BODIES[protocol].get(method, _ping)(rng)
        if rng.random() < (0.1 if method == "hello" else 0.8):  # who greets badly is cut off
            body = self._odd_value(body)
        try:
            return encode_rpc(Call(number, method, body))
        except LocalProtocolError:  # not plain, such as text that is no UTF-8
            return self._packed(["call", number, method, None])

    def _odd_frame(self, last_id: int) -> bytes:
        rng = self.rng
        match rng.randrange(4):
            case 0:
                return encode_rpc(Credit(rng.randint(1, last_id), rng.randint(1, 256)))
            case 1:
                return self._packed(self._odd_value(["call", last_id + 1, "hello", {}]))
            case 2:
                return damaged(self.rng, self._packed(["cancel", last_id]))
            case _:
                return damaged(self.rng, self._packed(["call", last_id + 1, "generate", to_wire(_generate(rng))]))

    def _packed(self, value: Any) -> bytes:
        try:
            return canonical.encode(value)
        except BadEncoding:
            return bytes(msgpack.packb(value))

    def _odd_value(self, value: Any) -> Any:
        return odd_value(self.rng, value)

    # -- gossip -------------------------------------------------------------------------------------------------

    def _advert(self) -> bytes:
        """A signed envelope of ours, now and then with an odd body or label; few are damaged after signing.

        Not more, for who is banned is heard no more.
        """
        rng = self.rng
        body = to_wire(_advert_of(rng))
        now_ms = time.time_ns() // 1_000_000
        self._sequence += rng.choice([1] * 10 + [0, -1, 2**40])
        statement: dict[str, Any] = {
            "domain": rng.choice([ADVERT_DOMAIN] * 40 + ["update"]),
            "network": rng.choice([self._network] * 40 + ["other"]),
            "sequence": self._sequence % 2**53,
            "time_ms": now_ms + rng.choice([0] * 10 + [-3_600_000, 3_600_000]),
            "expires_ms": now_ms + rng.choice([30_000] * 40 + [2**52, -1000, 0]),
            "body": self._packed(self._odd_value(body) if rng.random() < 0.1 else body),
        }
        try:
            raw = seal(self.identity, **statement)
        except BadEncoding:
            raw = rng.randbytes(200)
        return raw if rng.random() < 0.98 else damaged(self.rng, raw)

    def _said_on(self, topic: str) -> bytes:
        if topic != round_topic(self._network):
            return self._advert()
        raw = self._statement()
        return raw if self.rng.random() < 0.98 else damaged(self.rng, raw)

    def _statement(self) -> bytes:
        """Of the run that the host is in, or of another; properly signed."""
        now_ms = time.time_ns() // 1_000_000
        return sign_statement(
            self.identity, _body(self.rng), network=self._network, sequence=now_ms, time_ms=now_ms
        ).raw

    def _gossip(self) -> bytes:
        """A pubsub RPC with anything in its fields; messages are signed rightly, or not at all rightly."""
        rng, rpc = self.rng, rpc_pb2.RPC()
        topic = rng.choice([self._topic, self._topic, round_topic(self._network), "", *self._words(1, 40)])
        for _ in range(rng.randint(0, 2)):
            rpc.subscriptions.add(subscribe=rng.random() < 0.5, topicid=topic)
        for _ in range(rng.randint(0, 3)):
            rpc.publish.append(self._published(topic))
        if rng.random() < 0.6:
            control = rpc.control
            control.ihave.add(topicID=topic, messageIDs=self._numbers())
            control.iwant.add(messageIDs=self._numbers())
            control.graft.add(topicID=topic)
            control.prune.add(topicID=topic, backoff=rng.choice([0, 1, 2**31, 2**64 - 1]))
        raw = bytes(rpc.SerializeToString())
        if rng.random() < 0.3:
            worse = damaged(self.rng, raw)
            if rng.random() < 0.1 or _decodes(worse):  # most that do not decode are left out: they end the stream
                return worse
        return raw

    def _published(self, topic: str) -> rpc_pb2.Message:
        rng = self.rng
        message = rpc_pb2.Message(
            data=self._said_on(topic) if rng.random() < 0.8 else rng.randbytes(rng.randint(0, 200)),
            topicIDs=[topic, *self._words(1, 8)] if rng.random() < 0.2 else [topic],
            from_id=_peer_bytes(self.key_pair),
            seqno=rng.randbytes(8),
        )
        if rng.random() < 0.8:
            message.signature = self.key_pair.private_key.sign(b"libp2p-pubsub:" + message.SerializeToString())
            message.key = self.key_pair.public_key.serialize()
        else:
            message.from_id = rng.choice([b"", b"\0\x24\x08\x01\x12\x20" + rng.randbytes(32), rng.randbytes(34)])
            message.signature = rng.randbytes(64)
            message.key = rng.choice([b"", rng.randbytes(36)])
        return message

    # -- bytes --------------------------------------------------------------------------------------------------

    def _damaged_end(self, raw: bytes) -> bytes:
        """What follows the last frame is damaged: a wild length, or a frame that is cut."""
        return raw + self.rng.choice([b"\xff\xff\xff\xff", b"\0\0\1\0cut", self.rng.randbytes(9)])

    def _words(self, count_max: int, size_max: int) -> list[str]:
        letters = "Aa\x7f\u03b1\U0001f600"
        sizes = [self.rng.randint(0, size_max) for _ in range(self.rng.randint(0, count_max))]
        return ["".join(self.rng.choices(letters, k=size)) for size in sizes]

    def _numbers(self) -> list[bytes]:
        return [self.rng.randbytes(self.rng.randint(0, 42)) for _ in range(self.rng.randint(0, 4))]


def _joined(frames: list[bytes]) -> Frames:
    return Frames(b"".join(frames), len(frames))


def _peer_bytes(key_pair: KeyPair) -> bytes:
    return b"\0\x24" + key_pair.public_key.serialize()


def _decodes(frame: bytes) -> bool:
    """Whether a pubsub frame is a protobuf at all."""
    try:
        rpc_pb2.RPC().ParseFromString(frame)
    except DecodeError:
        return False
    return True


# -- right bodies, by protocol and method ---------------------------------------------------------------------------


def _hello(rng: random.Random) -> Any:
    return {
        "protocol": 1,
        "network": "fuzz",
        "agent": "fuzz/1",
        "instance": rng.randbytes(16).hex(),
        "addresses": [f"/ip4/10.0.0.{rng.randrange(256)}/tcp/{rng.randrange(1, 65_536)}"],
        "seen_at": "/ip4/10.0.0.1/tcp/4001",
        "refused": "",
        "twin": "",
    }


def _reach(rng: random.Random) -> Any:
    return {"ports": [rng.randint(1, 65535) for _ in range(rng.randint(1, 4))]}


def _ping(rng: random.Random) -> Any:
    return {"instance": rng.randbytes(16).hex(), "twin": ""}


def _generate(rng: random.Random) -> GenerateWork:
    prompt: dict[str, Any] = rng.choice(
        [
            {"text": "the quick brown \u03b1"[: rng.randint(1, 17)]},
            {"tokens": tuple(rng.randrange(320) for _ in range(rng.randint(1, 9)))},
            {"messages": (Message(role="user", content="tell me a tale"),)},
        ]
    )
    sampling = Sampling(
        max_tokens=rng.randint(1, 4),
        temperature=rng.choice([0.0, 1.0, 10.0]),
        top_k=rng.choice([0, 1, 1 << 20]),
        top_p=rng.choice([1.0, 1e-9]),
        min_p=rng.choice([0.0, 1.0]),
        repetition_penalty=rng.choice([1.0, 1e-9, 10.0]),
        seed=rng.getrandbits(63),
        stop=rng.choice([(), ("e",), ("\0", "zz")]),
        logprobs=rng.choice([None, 0, 5]),
    )
    delivered = tuple(rng.choices([0, 5, 319, 320, 2**31 - 1], k=rng.choice([0, 0, 0, 2])))
    return GenerateWork(request_id="q", sampling=sampling, delivered=delivered, remaining_ms=5000, **prompt)


def _embed(rng: random.Random) -> Any:
    texts: tuple[Any, ...] = ("one", "", "\u03b1" * rng.randint(1, 200), (1, 2, 319), (320, 2**31 - 1))
    return to_wire(EmbedWork(request_id="e", texts=texts[: rng.randint(1, 5)], remaining_ms=5000))


def _advert_of(rng: random.Random) -> Advert:
    offer = ModelOffer(
        name=f"tale-{rng.randrange(20)}", revision="r1", kind=ModelKind.CAUSAL, context_tokens=1024, dtype="float32"
    )
    capacity = Capacity(models=(offer,) * rng.randint(0, 3), slots_total=4, slots_free=2, accepting=rng.random() < 0.8)
    return Advert(
        instance=rng.randbytes(16).hex(),
        started_ms=1,
        agent="fuzz/1",
        addresses=(f"/ip4/10.0.0.1/tcp/{rng.randrange(1, 65_536)}",),
        capacity=capacity,
    )


def _answer_of(rng: random.Random) -> Any:
    return rng.choice(
        [_hello, _ping, lambda _: {"peers": [{"peer": "12D3KooW", "addresses": ["/ip4/1.1.1.1/tcp/1"]}]}]
    )(rng)


def _asked(rng: random.Random) -> Any:
    return {"run": rng.choice([RUN] * 9 + [rng.randbytes(32)]), "round": rng.choice([0, 0, 1, 5, 1 << 40])}


def _body(rng: random.Random) -> Body:
    """Of a round, by somebody who is no voter."""
    of: dict[str, Any] = {
        "run": rng.choice([RUN] * 9 + [rng.randbytes(32)]),
        "round": rng.choice([0, 1, 2, 3, 5, 8, 1 << 40]),
        "base": rng.choice([RUN_BASE, rng.randbytes(32)]),
    }
    name, view = rng.randbytes(32), rng.choice([0, 1, 2, 17, 1 << 16])
    contribution = Contribution(blob=name, payload_bytes=rng.choice([1, 300, 1 << 28]), steps=1, tokens=1)
    bodies: list[Body] = [
        Header(**of, contribution=rng.choice([None, contribution]), root=rng.choice([None, name])),
        Report(**of, present=(name,)),
        Proposal(**of, view=view, valid_view=-1, manifest=name, reports=(name,)),
        Prevote(**of, view=view, manifest=rng.choice([None, name])),
        Precommit(**of, view=view, manifest=rng.choice([None, name])),
    ]
    return rng.choice(bodies)


_LIMITS = {RPC_PROTOCOL: canonical.CONTROL, INFER_PROTOCOL: WORK_LIMITS, ROUND_PROTOCOL: ROUND_LIMITS}
_BODIES: dict[str, dict[str, Callable[[random.Random], Any]]] = {
    RPC_PROTOCOL: {"hello": _hello, "ping": _ping, "peers": lambda _rng: {}, "reach": _reach},
    INFER_PROTOCOL: {"generate": lambda rng: to_wire(_generate(rng)), "embed": _embed},
    ROUND_PROTOCOL: {"runs": lambda _rng: None, "follow": _asked, "behind": _asked},
}
