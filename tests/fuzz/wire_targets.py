"""Targets: what peers send. Frames, envelopes, calls, hellos, adverts, direct channels, manifests, work, addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec import Struct

from crypto import canonical
from crypto.digest import digest
from crypto.envelope import Envelope, open_envelope, seal
from crypto.errors import BadEncoding, BadKey, BadSignature, Expired, WrongNetwork
from crypto.identity import Identity, PeerId, peer_id_of, public_key_of
from gossip.errors import RemoteProtocolError as BadGossip
from gossip.messages import ADVERT_DOMAIN, Advert, Capacity, ModelKind, ModelOffer, advert_of, checked_capacity
from gossip.summaries import SUMMARY_DOMAIN, SelfSummary, checked_summary, summary_of
from gossip.transfer import decode_manifest, manifest_of
from node.judge import Judge
from node.work import (
    WORK_LIMITS,
    Embedded,
    EmbedWork,
    Finished,
    GenerateWork,
    Message,
    Piece,
    Progress,
    Sampling,
    Started,
    TokenLogprob,
    from_wire,
    item_from_wire,
    to_wire,
)
from p2p import direct_frames, hello, rpc
from p2p.address import Scope, believable, parse_address, seen_scope, told
from p2p.direct_frames import Agreement, Opener, Sealer
from p2p.errors import BadAddress, RemoteProtocolError
from p2p.frame import FrameReader, encode_frame
from p2p.mdns import read_txt
from p2p.transport import FRAME_BYTES_MAX
from tests.fuzz.target import Target, packed

IDENTITY: Final = Identity(bytes(range(32)))
NOW_MS: Final = 1_800_000_000_000
ADDRESS: Final = f"/ip4/203.0.113.7/tcp/4001/p2p/{IDENTITY.peer_id}"
WORKS: Final = (
    GenerateWork(request_id="a", text="once", sampling=Sampling(stop=("x",), logprobs=2), delivered=(1, 2)),
    GenerateWork(request_id="b", messages=(Message(role="user", content="tell"),), model="tale", revision="r1"),
    GenerateWork(request_id="c", tokens=(1, 2, 3)),
    EmbedWork(request_id="d", texts=("one", (1, 2))),
)
ITEMS: Final = (
    Started(served_by=IDENTITY.peer_id, model="tale", revision="r1", prompt_tokens=3),
    Progress(engine_steps=1, prefilled_tokens=2, queue_position=0),
    Piece(tokens=(5,), text="u", logprobs=(TokenLogprob(text="u", logprob=-0.5, top=(("u", -0.5),)),)),
    Finished(reason="stop", prompt_tokens=3, completion_tokens=1),
)
CAPACITY: Final = Capacity(
    models=(ModelOffer(name="tale", revision="r1", kind=ModelKind.CAUSAL, context_tokens=512, dtype="bf16"),),
    slots_total=4,
    slots_free=3,
    decode_tok_s=120.5,
    accepting=True,
)
SUMMARY: Final = SelfSummary(
    revision="r1", uptime_s=5.5, boot_count=2, loop_lag_ms=1.5, busy=0.5, queued=0.0, first_token_s=0.2,
    entropy_nats=2.5, margin=0.25, calibration_error=0.1, latency_skill=-0.5, load_skill=0.5, success_mean=1.0,
    success_least=0.5, head_id=9, head_hash=bytes(32),
)  # fmt: skip
ADVERT: Final = Advert(instance="00ff" * 4, started_ms=5, agent="a/1", addresses=(ADDRESS,), capacity=CAPACITY)


def canonical_target() -> Target:
    def read(raw: bytes) -> None:
        value = canonical.decode(raw)
        again = canonical.encode(value)
        assert canonical.decode_canonical(again) == value

    return Target(
        read=read, errors=(BadEncoding,), values=({"a": [1, 2.5, None, b"x"], "b": {"c": True}}, [-1, 2**64 - 1])
    )


def canonical_strict() -> Target:
    def read(raw: bytes) -> None:
        assert canonical.encode(canonical.decode_canonical(raw)) == raw

    return Target(
        read=read, errors=(BadEncoding,), values=({"a": [1, 2.5, None, b"x"], "b": {"c": True}}, [-1, 2**64 - 1])
    )


def envelope() -> Target:
    raw = seal(
        IDENTITY,
        domain=ADVERT_DOMAIN,
        network="main",
        sequence=7,
        time_ms=NOW_MS,
        expires_ms=NOW_MS + 30_000,
        body=b"hello",
    )

    def read(data: bytes) -> None:
        opened = open_envelope(data, domain=ADVERT_DOMAIN, network="main", now_ms=NOW_MS)
        assert data == raw, f"somebody else signs as {opened.sender}"

    return Target(
        read=read,
        errors=(BadEncoding, WrongNetwork, Expired, BadSignature),
        seeds=(raw,),
        values=(canonical.decode(raw),),
    )


def peer_id() -> Target:
    def read(raw: bytes) -> None:
        text = raw.decode("latin-1")
        assert peer_id_of(public_key_of(text)) == text

    return Target(read=read, errors=(BadKey,), seeds=(IDENTITY.peer_id.encode(), b"1" * 52, b"z" * 64))


def frames() -> Target:
    def read(raw: bytes) -> None:
        """The first byte says in which pieces the rest arrives."""
        size, rest, reader, found = max(1, raw[0] if raw else 1), raw[1:], FrameReader(), []
        for start in range(0, len(rest), size):
            found += reader.feed(rest[start : start + size])
        assert b"".join(map(encode_frame, found)) == rest[: len(rest) - reader.bytes_pending]

    whole = encode_frame(b"") + encode_frame(b"abc") + encode_frame(b"x" * 300)
    return Target(read=read, errors=(RemoteProtocolError,), seeds=(b"\x01" + whole, b"\xff" + whole))


def rpc_frame() -> Target:
    def read(raw: bytes) -> None:
        frame = rpc.decode_frame(raw)
        assert rpc.decode_frame(rpc.encode_frame(frame)) == frame

    return Target(read=read, errors=(RemoteProtocolError,), values=RPC_FRAMES, taken_bytes_max=64 << 20)


RPC_FRAMES: Final = (
    ["call", 1, "hello", {"a": 1}],
    ["credit", 1, 128],
    ["cancel", 1],
    ["item", 1, {"type": "piece"}],
    ["end", 1, None],
    ["error", 1, "busy", "later", True],
)


def rpc_stream() -> Target:
    """Many frames at one automaton; the first byte says which side it is."""

    def read(raw: bytes) -> None:
        caller = bool(raw) and raw[0] % 2 == 0
        automaton = rpc.Rpc(rpc.Role.CALLER if caller else rpc.Role.CALLEE)
        for _ in range(3 if caller else 0):
            automaton.call("m", None)
        for frame in FrameReader().feed(raw[1:]):
            automaton.receive(frame)
            assert 0 <= automaton.unfinished <= rpc.CALLS_MAX

    def pack(values: Any) -> bytes:
        rows = values if isinstance(values, list) else [values]
        return b"\x01" + b"".join(encode_frame(packed(row)[:FRAME_BYTES_MAX]) for row in rows)

    to_callee = [["call", 1, "a", None], ["credit", 1, 1], ["call", 2, "b", None], ["cancel", 1], ["cancel", 1]]
    to_caller = [["item", 1, "x"], ["end", 1, None], ["error", 2, "busy", "", True], ["item", 3, b"y" * 2000]]
    return Target(
        read=read,
        errors=(RemoteProtocolError,),
        seeds=(b"\x02" + pack(to_caller)[1:],),
        values=(to_callee, to_caller),
        pack=pack,
        taken_bytes_max=64 << 20,
    )


def hellos() -> Target:
    """Control messages: hello, ping, peers; the same bytes are shown to all three."""
    readers: tuple[Callable[[Any], Any], ...] = (hello.read_hello, hello.read_ping, hello.read_known_peers)

    def read(raw: bytes) -> None:
        value, taken = canonical.decode(raw), 0
        for reader in readers:
            try:
                found = reader(value)
            except RemoteProtocolError:
                continue
            taken += 1
            if isinstance(found, Struct):
                assert reader(hello.to_value(found)) == found
            if isinstance(found, hello.Hello | int):
                hello.objection("main", found)
            if isinstance(found, hello.KnownPeers):
                for known in found.peers:
                    believed = told(known.addresses, PeerId(known.peer), Scope.PUBLIC)
                    assert all(address.scope is Scope.PUBLIC for address in believed)
        if not taken:
            raise RemoteProtocolError("none of the three")

    greeting = {
        "protocol": 1, "network": "main", "agent": "a/1", "instance": "0f" * 16, "addresses": [ADDRESS],
        "seen_at": "/ip4/10.0.0.1/tcp/9", "refused": "", "twin": "",
    }  # fmt: skip
    peers = {"peers": [{"peer": IDENTITY.peer_id, "addresses": [ADDRESS, "/dns/a.example/tcp/1"]}]}
    return Target(
        read=read,
        errors=(BadEncoding, RemoteProtocolError),
        values=(greeting, {"instance": "0f" * 16, "twin": ""}, peers, {"protocol": 2, "new": []}),
    )


def address() -> Target:
    def read(raw: bytes) -> None:
        text = raw.decode("utf-8", "replace")
        seen_scope(text)
        found = parse_address(text)
        assert parse_address(found.text) == found
        assert found.bare + f"/p2p/{found.peer}" == text
        assert found.group is None or believable(found, Scope.LOOPBACK)

    hosts = ("ip4/1.2.3.4", "ip6/2001:db8::1", "ip6/::ffff:1.2.3.4", "ip6/fe80::1%eth0", "dns/a.example", "dns4/x")
    seeds = [f"/{host}/tcp/4001/p2p/{IDENTITY.peer_id}" for host in hosts]
    wrong = ("/p2p/x", "/ip4/1.2.3.4/p2p/x", "/ip4/1.2.3.4/tcp/p2p", "/ip4/1.2.3.4/tcp/²/p2p/x", "/p2p-circuit")
    return Target(read=read, errors=(BadAddress,), seeds=tuple(text.encode() for text in (*seeds, *wrong, "/" * 250)))


def advert() -> Target:
    def read(raw: bytes) -> None:
        statement = Envelope(
            v=1,
            domain=ADVERT_DOMAIN,
            network="main",
            sender=IDENTITY.peer_id,
            sequence=1,
            time_ms=NOW_MS,
            expires_ms=NOW_MS + 1,
            body=raw,
        )
        found = advert_of(statement)
        checked_capacity(found.capacity)
        body = canonical.encode_struct(found)
        assert canonical.decode_struct(body, Advert) == found

    return Target(read=read, errors=(BadGossip,), values=(canonical.decode(canonical.encode_struct(ADVERT)),))


def summary() -> Target:
    def read(raw: bytes) -> None:
        statement = Envelope(
            v=1,
            domain=SUMMARY_DOMAIN,
            network="main",
            sender=IDENTITY.peer_id,
            sequence=1,
            time_ms=NOW_MS,
            expires_ms=NOW_MS + 1,
            body=raw,
        )
        found = checked_summary(summary_of(statement))
        body = canonical.encode_struct(found)
        assert canonical.decode_struct(body, SelfSummary) == found

    empty = SelfSummary()
    return Target(
        read=read,
        errors=(BadGossip,),
        values=tuple(canonical.decode(canonical.encode_struct(each)) for each in (SUMMARY, empty)),
    )


def direct_agreement() -> Target:
    """The three messages of an agreement, and the keys that follow from a peer's."""
    own = X25519PrivateKey.from_private_bytes(b"\x01" * 32)
    own_key = own.public_key().public_bytes_raw()

    def read(raw: bytes) -> None:
        value, taken = canonical.decode(raw), 0
        for kind in (direct_frames.Ask, direct_frames.Offer, direct_frames.Choice):
            try:
                found = canonical.convert(value, kind)
            except BadEncoding:
                continue
            taken += 1
            assert canonical.decode_struct(canonical.encode_struct(found), kind) == found
            if isinstance(found, direct_frames.Ask):
                agreement = Agreement(
                    opener=IDENTITY.peer_id,
                    server=IDENTITY.peer_id,
                    protocol=found.protocol,
                    opener_key=found.key,
                    server_key=own_key,
                )
                assert len(agreement.keys(own, found.key).token) == direct_frames.TOKEN_BYTES
        if not taken:
            raise RemoteProtocolError("none of the three")

    values = (
        {"protocol": "/x/1", "key": b"\x09" + bytes(31)},
        {"protocol": "/x/1", "key": bytes(32)},
        {"served": True, "key": own_key, "port": 4001},
        {"direct": True},
    )
    return Target(read=read, errors=(BadEncoding, RemoteProtocolError), values=values)


def direct_sealed() -> Target:
    """Frames of a direct channel: only those that were sealed open, in their order."""
    sealer, contents = Sealer(bytes(32)), (b"", b"hello", b"x" * 100)
    sealed = [bytes(sealer.seal(content)) for content in contents] + [bytes(sealer.seal(b"", direct_frames.KIND_END))]
    whole = b"".join(sealed)

    def read(raw: bytes) -> None:
        opener, at, opened = Opener(bytes(32)), 0, []
        while len(raw) - at >= direct_frames.HEAD_BYTES:
            head = raw[at : at + direct_frames.HEAD_BYTES]
            size = opener.body_bytes(head)
            at += direct_frames.HEAD_BYTES
            if len(raw) - at < size:
                break
            opened.append(opener.open(head, raw[at : at + size]))
            at += size
        assert opened == list((*contents, b"")[: len(opened)])

    return Target(read=read, errors=(RemoteProtocolError,), seeds=(whole, sealed[0], whole[:-3], sealed[1]))


def manifest() -> Target:
    def read(raw: bytes) -> None:
        found = decode_manifest(raw, digest(raw))
        assert found.encode() == raw
        spans = [found.span(index) for index in range(found.count)]
        assert sum(length for _, length in spans) == found.blob_bytes
        assert all(0 < length <= found.chunk_bytes for _, length in spans)
        assert list(found.covering(0, found.blob_bytes)) == list(range(found.count))

    values = [canonical.decode(manifest_of(content, 1024).encode()) for content in (b"", b"abc", b"x" * 5000)]
    return Target(read=read, errors=(BadGossip,), values=tuple(values))


def work() -> Target:
    """What a peer asks of us."""

    def read(raw: bytes) -> None:
        value, taken = canonical.decode(raw, WORK_LIMITS), 0
        for kind in (GenerateWork, EmbedWork):
            try:
                found = from_wire(value, kind)
            except RemoteProtocolError:
                continue
            taken += 1
            assert from_wire(to_wire(found), kind) == found
        if not taken:
            raise RemoteProtocolError("neither")

    return Target(
        read=read,
        errors=(BadEncoding, RemoteProtocolError),
        values=tuple(to_wire(each) for each in WORKS),
        taken_bytes_max=64 << 20,
    )


def answer() -> Target:
    """What a peer answers us: items before a judge, who counts, and vectors."""

    def read(raw: bytes) -> None:
        rows = canonical.decode(raw, WORK_LIMITS)
        if not isinstance(rows, list):
            from_wire(rows, Embedded)
            return
        judge = Judge(IDENTITY.peer_id, CAPACITY, WORKS[2], 0.0)
        for number, row in enumerate(rows):
            item = item_from_wire(row)
            assert item_from_wire(to_wire(item)) == item
            if isinstance(item, Finished):
                judge.end(item)
            else:
                judge.take(item, number / 100)
            assert judge.tokens_received <= WORKS[2].sampling.max_tokens

    embedded = Embedded(
        served_by=IDENTITY.peer_id,
        model="m",
        revision="r",
        dimensions=2,
        vectors=(bytes(8),),
        truncated=(False,),
        prompt_tokens=1,
    )
    return Target(
        read=read,
        errors=(BadEncoding, RemoteProtocolError),
        values=([to_wire(item) for item in ITEMS], to_wire(embedded)),
        taken_bytes_max=64 << 20,
    )


def mdns() -> Target:
    """A TXT record of the LAN: `key=value`, one a line. Nothing is raised at all."""

    def read(raw: bytes) -> None:
        lines = [line.partition(b"=") for line in raw.split(b"\n")]
        txt = {key.decode("utf-8", "replace"): value.decode("utf-8", "replace") or None for key, _, value in lines}
        found = read_txt(txt)
        assert found is None or all(address.peer == found.peer for address in found.addresses)

    right = f"v=1\nnet=main\npeer={IDENTITY.peer_id}\ninst=00ff\na0=/ip4/10.0.0.1/tcp/4001\na1=/ip6/fe80::1/tcp/1"
    return Target(read=read, errors=(), seeds=(right.encode(),))


TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "canonical": canonical_target,
    "canonical_strict": canonical_strict,
    "envelope": envelope,
    "peer_id": peer_id,
    "frames": frames,
    "rpc_frame": rpc_frame,
    "rpc_stream": rpc_stream,
    "advert": advert,
    "summary": summary,
    "address": address,
    "direct_agreement": direct_agreement,
    "direct_sealed": direct_sealed,
    "manifest": manifest,
    "work": work,
    "answer": answer,
    "mdns": mdns,
}
