"""What this node itself measured of each peer: round trips, first tokens, speed, success, its own requests there.

Rules: core. Only what happened to our own requests counts; nothing a peer says enters here. Averages follow the last
dozen samples, success the last ten minutes. What this node remembers of the time before it started is a prior worth
REMEMBERED_MAX requests at most, which fades, and of which each new outcome takes half. The load of a peer is what it
claims, corrected by our own requests that its last advert cannot have counted yet, so that many requests within one
advert's life do not herd.
Source: SERVING.md "Routing"; Jacobson's mean and deviation for lateness (RFC 6298).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from crypto.identity import PeerId
from gossip.breaker import Breaker, State

PEERS_MAX = 4096
REMEMBERED_MAX = 3.0  # requests that all which is remembered of a peer is worth
REMEMBERED_HALF_LIFE_S = 21_600.0  # over a night it fades to a third
REMEMBERED_LEAST = 0.5  # of a request: less says nothing
ENDED_MAX = 256  # ended requests remembered of each peer: more cannot end within one advert's life of a slow engine
SAMPLE_WEIGHT = 0.2  # of the newest sample
SUCCESS_HALF_LIFE_S = 300.0
FADED_LEAST = 0.01  # of a request: half an hour after the only one nothing is said of it any more
NETWORK_PRIOR = 0.5  # one failure and no success make a network dubious, until half of it has faded
NETWORKS_MAX = 1024
NEWCOMERS_PRIOR = 3.0  # newcomers that worked, before any was tried
SEEN_LAG_S = 0.2  # an advert counts the requests that reached its sender before it was made, about so long ago
FULL_S_MIN = 0.5  # a peer that refused is left alone so long, twice as long at each refusal in a row
FULL_S_MAX = 10.0
FIRST_TOKEN_LATE_S_DEFAULT = 5.0  # before anything was measured
FIRST_TOKEN_LATE_S_MIN, FIRST_TOKEN_LATE_S_MAX = 0.25, 60.0
FULL_REASONS = frozenset({"no_room", "busy", "not_ready"})  # the peer is well and says no
# the request's own fault, or it is of a later version than the peer
NEUTRAL_REASONS = frozenset(
    {"deadline", "bad_request", "too_large", "context_length_exceeded", "cancelled", "unknown_method"}
)
UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was measured of a peer; None = never. success: 0..1, of recent requests, 1 for none.

    Of a peer that never finished a request for us it is also as other such peers fared: where many newcomers are black
    holes, one looks twice before trying another. distrusted: all that speaks for or against it is remembered failure.
    """

    state: State
    proven: bool
    in_flight: int
    answers: int  # own requests that it finished, so far
    rtt_s: float | None
    first_token_s: float | None
    tok_s: float | None
    success: float
    refusing: bool  # it said no room a moment ago
    connected: bool | None
    distrusted: bool = False


@dataclass(slots=True)
class _Tally:
    """Requests that were answered, and that failed, fading."""

    worked: float = 0.0
    failed: float = 0.0
    faded_s: float = 0.0

    def fade(self, now: float) -> None:
        keep = 0.5 ** (max(0.0, now - self.faded_s) / SUCCESS_HALF_LIFE_S)
        self.worked, self.failed, self.faded_s = self.worked * keep, self.failed * keep, now

    def share(self, now: float) -> float | None:
        """The share that worked; None when less than FADED_LEAST of a request is left."""
        ended = self.worked + self.failed
        keep: float = 0.5 ** (max(0.0, now - self.faded_s) / SUCCESS_HALF_LIFE_S)
        return None if ended * keep < FADED_LEAST else self.worked / ended

    def success(self, prior: float, now: float, before: tuple[float, float] = (0.0, 0.0)) -> float:
        """The share that worked, as if `prior` more had; before: worked and failed, remembered."""
        keep: float = 0.5 ** (max(0.0, now - self.faded_s) / SUCCESS_HALF_LIFE_S)
        worked = prior + before[0] + self.worked * keep
        return worked / (worked + before[1] + self.failed * keep)


@dataclass(frozen=True, slots=True)
class _Remembered:
    """Requests before this run: as many as they are worth at `at_s`."""

    worked: float
    failed: float
    at_s: float

    def at(self, now: float) -> tuple[float, float]:
        keep: float = 0.5 ** (max(0.0, now - self.at_s) / REMEMBERED_HALF_LIFE_S)
        return self.worked * keep, self.failed * keep

    def halved(self) -> _Remembered:
        return _Remembered(self.worked / 2, self.failed / 2, self.at_s)


@dataclass(slots=True)
class _Record:
    breaker: Breaker = field(default_factory=Breaker)
    rtt_s: float | None = None
    first_token_s: float | None = None
    first_token_deviation_s: float = 0.0
    tok_s: float | None = None
    tally: _Tally = field(default_factory=_Tally)
    answers: int = 0
    starts: list[float] = field(default_factory=list)  # of requests under way, oldest first
    ended: list[tuple[float, float]] = field(default_factory=list)  # (start, end); an empty deque has 0.7 kB
    full_until_s: float = 0.0
    refusals: int = 0  # in a row
    connected: bool | None = None
    network: str | None = None
    before: _Remembered | None = None


class Observations:
    """The measurements of one node, fed by whoever sends requests. Times are monotonic seconds.

    For each request: started once, then first_token, finished, failed or refused as they come, then ended once.
    """

    def __init__(self, *, peers_max: int = PEERS_MAX) -> None:
        self._records: dict[PeerId, _Record] = {}  # least recently used first
        self._newcomers = _Tally()  # first requests to peers
        self._networks: dict[str, _Tally] = {}  # the same, of each public network; least recently used first
        self._peers_max = peers_max

    # --- in ---

    def started(self, peer: PeerId, now: float) -> None:
        """A request goes to the peer."""
        record = self._record(peer)
        record.breaker.started(now)
        record.starts.append(now)

    def first_token(self, peer: PeerId, seconds: float) -> None:
        """The first token of a request came `seconds` after it was sent."""
        record = self._record(peer)
        if record.first_token_s is None:
            record.first_token_s, record.first_token_deviation_s = seconds, seconds / 2
            return
        off_s = abs(seconds - record.first_token_s)
        record.first_token_deviation_s += SAMPLE_WEIGHT * (off_s - record.first_token_deviation_s)
        record.first_token_s += SAMPLE_WEIGHT * (seconds - record.first_token_s)

    def finished(self, peer: PeerId, tokens: int, seconds: float, now: float) -> None:
        """A request was answered in full: `tokens` in `seconds` from first to last (0 tokens: an embedding)."""
        record = self._record(peer)
        for tally in self._tallies(record):
            tally.fade(now)
            tally.worked += 1.0
        record.before = None if record.before is None else record.before.halved()
        record.breaker.worked(now)
        record.answers += 1
        record.refusals, record.full_until_s = 0, 0.0
        if tokens > 1 and seconds > 0.0:
            record.tok_s = _mixed(record.tok_s, tokens / seconds)

    def failed(self, peer: PeerId, reason: str, now: float) -> None:
        """A request ended otherwise. reason: a stable code; FULL_REASONS and NEUTRAL_REASONS are no failures."""
        if reason in NEUTRAL_REASONS:
            return
        if reason in FULL_REASONS:
            self.refused(peer, now)
            return
        record = self._record(peer)
        record.breaker.failed(now, unreachable=reason == UNREACHABLE and not record.connected)
        for tally in self._tallies(record):
            tally.fade(now)
            tally.failed += 1.0
        record.before = None if record.before is None else record.before.halved()

    def refused(self, peer: PeerId, now: float) -> None:
        """The peer has no room, whatever its advert says."""
        record = self._record(peer)
        record.full_until_s = now + min(FULL_S_MAX, FULL_S_MIN * 2.0**record.refusals)
        record.refusals = min(record.refusals + 1, 16)

    def ended(self, peer: PeerId, now: float) -> None:
        """A request is no longer under way, however it ended."""
        record = self._record(peer)
        assert record.starts, "ended without started"
        record.ended.append((record.starts.pop(0), now))
        del record.ended[:-ENDED_MAX]
        if not record.starts:
            record.breaker.released(now)

    def rtt(self, peer: PeerId, seconds: float) -> None:
        """A round trip was measured."""
        record = self._record(peer)
        record.rtt_s = _mixed(record.rtt_s, seconds)

    def connected(self, peer: PeerId, connected: bool, now: float) -> None:
        """The connection to the peer came up or went down."""
        record = self._record(peer)
        record.connected = connected
        if connected:
            record.breaker.reconnected(now)

    def located(self, peer: PeerId, network: str | None) -> None:
        """A connected peer is seen in this public network (p2p.address.network_of)."""
        self._record(peer).network = network

    def remember(
        self, peer: PeerId, *, worked: float, failed: float, age_s: float, now: float, rtt_s: float | None = None
    ) -> None:
        """Of this node's own requests to the peer in earlier runs so many worked and failed, about age_s ago; to be
        told once, at the start. A peer for which most worked is proven. Raises ValueError for what is no such count.
        """
        if not all(0.0 <= each < float("inf") for each in (worked, failed, age_s, rtt_s or 0.0)):
            raise ValueError(f"{worked} worked and {failed} failed {age_s} s ago came, wanted are numbers of 0 or more")
        scale = min(1.0, REMEMBERED_MAX / max(worked + failed, REMEMBERED_MAX))
        before = _Remembered(worked * scale, failed * scale, now - age_s)
        good, bad = before.at(now)
        if good + bad < REMEMBERED_LEAST:
            return
        record = self._record(peer)
        record.before = before
        record.rtt_s = rtt_s if record.rtt_s is None else record.rtt_s
        record.breaker.proven = record.breaker.proven or good - bad >= REMEMBERED_LEAST

    def _tallies(self, record: _Record) -> list[_Tally]:
        """Where the outcome of a request to a peer counts."""
        tallies = [record.tally]
        if not record.breaker.proven:
            tallies.append(self._newcomers)
            if record.network is not None:
                tally = self._networks.pop(record.network, None) or _Tally()
                self._networks[record.network] = tally
                if len(self._networks) > NETWORKS_MAX:
                    del self._networks[next(iter(self._networks))]
                tallies.append(tally)
        return tallies

    def _record(self, peer: PeerId) -> _Record:
        record = self._records.pop(peer, None) or _Record()
        self._records[peer] = record  # now the most recent
        if len(self._records) > self._peers_max:
            idle = (other for other, kept in self._records.items() if not kept.starts and other != peer)
            if (oldest := next(idle, None)) is not None:
                del self._records[oldest]
        return record

    # --- out ---

    def observed(self, peer: PeerId, now: float) -> Observed:
        """What is known of a peer."""
        record = self._records.get(peer)
        if record is None:
            record = _Record()
        before = (0.0, 0.0) if record.before is None else record.before.at(now)
        success = record.tally.success(1.0, now, before)
        if not record.breaker.proven:
            success *= self._newcomers.success(NEWCOMERS_PRIOR, now)
        return Observed(
            state=record.breaker.state(now),
            proven=record.breaker.proven,
            in_flight=len(record.starts),
            answers=record.answers,
            rtt_s=record.rtt_s,
            first_token_s=record.first_token_s,
            tok_s=record.tok_s,
            success=success,
            refusing=now < record.full_until_s,
            connected=record.connected,
            distrusted=before[1] - before[0] >= REMEMBERED_LEAST and not record.breaker.proven,
        )

    def measured(self, peer: PeerId, now: float) -> tuple[float | None, float | None]:
        """(share of own requests that worked, round trip in seconds), as measured and without any prior; None: never,
        or so long ago that it has faded."""
        record = self._records.get(peer)
        if record is None:
            return None, None
        return record.tally.share(now), record.rtt_s

    def network(self, peer: PeerId) -> str | None:
        """The public network in which the peer was last seen; None: in a private one, or never."""
        record = self._records.get(peer)
        return record.network if record else None

    def is_dubious(self, network: str, now: float) -> bool:
        """Whether first requests to peers of a network failed lately, more than worked."""
        tally = self._networks.get(network)
        return tally is not None and tally.success(NETWORK_PRIOR, now) < 0.5

    def load(self, peer: PeerId, claimed: int, advert_s: float) -> int:
        """Requests at the peer: `claimed` busy and queued by its advert received at `advert_s`, corrected by ours."""
        record = self._records.get(peer)
        if record is None:
            return claimed
        seen_until_s = advert_s - SEEN_LAG_S
        unseen = sum(start > seen_until_s for start in record.starts)
        over = sum(start <= seen_until_s and end > advert_s for start, end in record.ended)
        return max(claimed - over, len(record.starts) - unseen) + unseen

    def retry_in_s(self, peer: PeerId, now: float) -> float:
        """Seconds until a request may be sent to the peer again, as far as breaker and refusals say."""
        record = self._records.get(peer)
        return max(record.breaker.retry_in_s(now), record.full_until_s - now, 0.0) if record else 0.0

    def first_token_late_s(self, peer: PeerId) -> float:
        """After how long without a first token a request is late there, so that a second one elsewhere is worth it."""
        record = self._records.get(peer)
        if record is None or record.first_token_s is None:
            return FIRST_TOKEN_LATE_S_DEFAULT
        late_s = record.first_token_s + 4 * record.first_token_deviation_s
        return min(FIRST_TOKEN_LATE_S_MAX, max(FIRST_TOKEN_LATE_S_MIN, late_s))

    def is_proven(self, peer: PeerId) -> bool:
        """Whether the peer has ever finished a request for us."""
        record = self._records.get(peer)
        return record is not None and record.breaker.proven

    def peers(self) -> tuple[PeerId, ...]:
        """The peers that anything is known of."""
        return tuple(self._records)


def _mixed(mean: float | None, sample: float) -> float:
    return sample if mean is None else mean + SAMPLE_WEIGHT * (sample - mean)
