"""One client's request on its way to an answer: who is asked next, what the client already has, when to give up.

Rules: core. Whoever carries it out asks for the next `step`, does it, and tells what came of it. A server that failed
is not asked again for this request, unless all it said was that it is full. What the client has is sent along, so that
the next server goes on where the last one stopped, under the same revision; in a run of training, whose members go on
round by round, under a later one when nobody has it any more. A next server that says nothing at once is passed over
while there is another: the network to it may be cut, which is found out much later. A request ends once: answered in
full, or by a RequestError.
Source: SERVING.md "Routing"; docs/ARCHITECTURE.md "A request".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from crypto.identity import PeerId
from gossip.messages import ModelKind
from gossip.routing import Candidate, Need, Why, WhyNot
from node.errors import (
    NO_ROOM_RETRY_S,
    BadRequest,
    DeadlinePassed,
    NoRoom,
    NotReady,
    PeerFailed,
    RequestError,
    TooLarge,
    TooLong,
    UnknownModel,
)
from node.front import Route, RouteHint
from node.lineage import lineage_of
from node.loading import Loading
from node.work import (
    PROMPT_CHARS_MAX,
    REMAINING_MS_MAX,
    SAID,
    AnswerItem,
    EmbedWork,
    Finished,
    GenerateWork,
    Piece,
    Started,
)

ATTEMPTS_MAX = 8
NOTHING_SERVED = "nothing yet: start a node with a model, or join one that has (--bootstrap)"
DEADLINE_GRACE_MS = 100
HURRY_S = 1.0  # for the first word of a takeover: its client waits in mid-answer; on a lame machine it takes 0.3
FULL_WAIT_S = 0.5  # between looks for room, for an answer that has begun


class Reads(Protocol):
    """A model, as far as it matters how much it reads."""

    @property
    def context_tokens(self) -> int:
        """Of prompt and answer together."""


class Engine(Protocol):
    """The model hosted here, as far as the choice needs it."""

    @property
    def revision(self) -> str:
        """Of the main model, now."""

    def serves(self, model: str | None, revision: str | None, kind: str) -> bool:
        """Whether it can answer such a request at all."""

    def has_room(self) -> bool:
        """Whether a request would start at once."""

    def facts(self, kind: str) -> Reads | None:
        """The model that answers requests of a kind, None when there is none."""


H = TypeVar("H", bound=Engine)
H_co = TypeVar("H_co", bound=Engine, covariant=True)


class Surroundings(Protocol[H_co]):
    """What a request sees of the node around it."""

    @property
    def own(self) -> PeerId:
        """This node."""

    @property
    def hosting(self) -> H_co | None:
        """The engine here, when there is one."""

    def rank(self, need: Need) -> tuple[Candidate, ...] | WhyNot:
        """Peers to ask, best first, or why there is none."""

    def served_names(self) -> Iterable[str]:
        """Every model that is served now, here or elsewhere."""

    @property
    def loading(self) -> Loading | None:
        """What this node will serve and does not yet."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Seek:
    """Ask the network who serves a model, None: any, then look again."""

    model: str | None


@dataclass(slots=True, kw_only=True)
class Pursuit(Generic[H]):
    """What one request has behind it: who failed, what the client already has. Make it with `pursue`."""

    work: GenerateWork | EmbedWork
    route: RouteHint
    around: Surroundings[H]
    deadline: float  # on the clock of `now`, in seconds
    tried: set[PeerId] = field(default_factory=set)  # ours when the local engine failed
    passed_over: set[PeerId] = field(default_factory=set)  # silent in a hurry: asked again when nobody else is left
    tokens: list[int] = field(default_factory=list)
    chars: int = 0
    texts: list[str] = field(default_factory=list)  # the answer so far, where its tokens' ids are not told
    started: Started | None = None
    prompt_tokens: int = 0
    last_error: RequestError | None = None
    tries: int = 0
    has_sought: bool = False
    tokens_min: int = 0  # a server with a shorter context was tried
    goes_on_later: bool = False  # nobody has the run's revision any more: an answer goes on under a later one

    def step(self) -> H | Candidate | Wait | Seek:
        """The engine here, or the peer, to ask now, or what to do before. Raises RequestError: it ends so."""
        if self.tries >= ATTEMPTS_MAX:
            raise self.last_error or PeerFailed("no attempt was made")
        target = self._choose()
        if isinstance(target, WhyNot) and self.passed_over:
            self.passed_over.clear()
            target = self._choose()
        if isinstance(target, WhyNot) and target.why is Why.NONE_SERVES and self._lineage() and not self.goes_on_later:
            self.goes_on_later = True
            target = self._choose()
        if isinstance(target, WhyNot):
            if self._may_seek(target):
                self.has_sought = True
                return Seek(self._model())
            if self.started is None or target.why is not Why.ALL_FULL:
                raise self._nobody(target)
            return Wait(FULL_WAIT_S)  # half an answer is worth a wait
        self.tries += 1
        return target

    def hurry_s(self, target: H | Candidate) -> float:
        """How long to wait for this server's first word while there is another to ask."""
        if self.started is None or not isinstance(target, Candidate):
            return math.inf
        ranking = self._related(self.around.rank(self._need()))
        return math.inf if isinstance(ranking, WhyNot) or len(ranking) < 2 else HURRY_S

    def hurried(self, target: H | Candidate) -> None:
        """The server of the last step said nothing in its hurry_s: others first."""
        assert isinstance(target, Candidate), "the engine here is not hurried"
        self.passed_over.add(target.peer)

    def failed(self, target: H | Candidate, error: RequestError) -> None:
        """The server of the last step failed. Raises the error, when it is the request's own fault."""
        who = target.peer if isinstance(target, Candidate) else self.around.own
        if isinstance(error, TooLong) and not self.tokens:  # another's context may be longer
            facts = target.model if isinstance(target, Candidate) else target.facts(self._kind())
            self.tokens_min = max(self.tokens_min, 0 if facts is None else facts.context_tokens + 1)
        elif isinstance(error, BadRequest | TooLarge):
            if not self.tokens:
                raise error
            # the client's part was taken once: at fault is what an earlier peer delivered
            error = PeerFailed(f"the answer cannot be continued: {error}")
        if self._goes_by_text() and self.chars > PROMPT_CHARS_MAX:
            raise PeerFailed(
                f"the serving peer failed after {self.chars} characters ({error}), and others go on with at most "
                f"{PROMPT_CHARS_MAX}"
            )
        if who == self.around.own or not isinstance(error, NoRoom):
            self.tried.add(who)
        self.last_error = error

    def take(self, item: AnswerItem) -> bool:
        """An item came; whether it is for the client, which then has it."""
        if isinstance(item, Started):
            if self.started is not None:
                return False
            self.started, self.prompt_tokens = item, item.prompt_tokens
        if isinstance(item, Piece):
            self.tokens.extend(item.tokens)
            self.chars += len(item.text)
            if self._goes_by_text() and self.chars <= PROMPT_CHARS_MAX:
                self.texts.append(item.text)
        if isinstance(item, Finished):
            self.prompt_tokens = item.prompt_tokens
        return True

    def _goes_by_text(self) -> bool:
        """Whether another server goes on after the answer's text: who answers tells no ids of its tokens."""
        return self.started is not None and self.started.revision.startswith(SAID)

    def continued(self, now: float) -> Any:
        """The same work, for the next server: less time, more delivered."""
        changes: dict[str, Any] = {"remaining_ms": self._left_ms(now)}
        if self.started is not None and isinstance(self.work, GenerateWork):
            changes |= {
                "model": self.started.model,
                "revision": self._revision(),
                "delivered": (*self.work.delivered, *self.tokens),
                "delivered_chars": self.work.delivered_chars + self.chars,
                "delivered_text": self.work.delivered_text + "".join(self.texts),
            }
        return msgspec.structs.replace(self.work, **changes)

    def too_late(self) -> DeadlinePassed:
        """The deadline is over: the end of the request."""
        had = f"; {len(self.tokens)} tokens were delivered. Ask for fewer tokens or" if self.tokens else ";"
        given_s = self.work.remaining_ms / 1000
        given = f"{given_s:.0f}" if given_s >= 10 else f"{given_s:.2g}"
        return DeadlinePassed(f"the request's {given} s are over{had} give it more time")

    def _left_ms(self, now: float) -> int:
        """Milliseconds that the next server has: a little more than is left, so that it is we who say it is over."""
        left_ms = max(0, int((self.deadline - now) * 1000))
        return min(left_ms + DEADLINE_GRACE_MS, REMAINING_MS_MAX)

    def _choose(self) -> H | Candidate | WhyNot:
        """The engine here if it may and has room, else the best peer, else the queue here, else why nobody."""
        here, embeds = self._here(), isinstance(self.work, EmbedWork)
        stays = self.route.route is Route.LOCAL or self.route.peer == self.around.own
        if here is not None and (embeds or stays or here.has_room()):
            return here
        if stays:
            return WhyNot.none_serves()
        ranking = self._related(self.around.rank(self._need()))
        if here is not None and (isinstance(ranking, WhyNot) or ranking[0].offer.capacity.slots_free < 1):
            return here
        return ranking if isinstance(ranking, WhyNot) else ranking[0]

    def _related(self, ranking: tuple[Candidate, ...] | WhyNot) -> tuple[Candidate, ...] | WhyNot:
        """When any revision will do, only those of the same run of training."""
        if isinstance(ranking, WhyNot) or not self.goes_on_later:
            return ranking
        return (
            tuple(each for each in ranking if lineage_of(each.model.revision) == self._lineage())
            or WhyNot.none_serves()
        )

    def _lineage(self) -> str:
        return "" if self.started is None else lineage_of(self.started.revision)

    def _may_seek(self, why: WhyNot) -> bool:
        """Whether nobody known serves it, and others may know somebody."""
        is_ours_to_find = self.route.route is not Route.LOCAL and self.route.peer is None
        is_too_long = isinstance(self.last_error, TooLong)
        return not self.has_sought and why.why is Why.NONE_SERVES and is_ours_to_find and not is_too_long

    def _here(self) -> H | None:
        """The engine here, if the client lets it answer, it can, and it has not failed this request."""
        own, here = self.around.own, self.around.hosting
        if here is None or self.route.route is Route.REMOTE or self.route.peer not in (None, own) or own in self.tried:
            return None
        if not here.serves(self._model(), self._revision(), self._kind()):
            return None
        return here if not self.goes_on_later or lineage_of(here.revision) == self._lineage() else None

    def _need(self) -> Need:
        return Need(
            model=self._model(),
            revision=self._revision(),
            kind=self._kind(),
            tokens=self._tokens(),
            exclude=frozenset(self.tried | self.passed_over),
            only=None if self.route.peer is None else PeerId(self.route.peer),
        )

    def _tokens(self) -> int:
        """Prompt and answer, as far as that is known."""
        work = self.work
        known = work.sampling.max_tokens + len(work.tokens or ()) if isinstance(work, GenerateWork) else 0
        return max(known, self.tokens_min)

    def _kind(self) -> str:
        return ModelKind.CAUSAL if isinstance(self.work, GenerateWork) else ModelKind.ENCODER

    def _model(self) -> str | None:
        return self.work.model if self.started is None else self.started.model

    def _revision(self) -> str | None:
        if self.started is not None:
            return None if self.goes_on_later else self.started.revision
        return self.work.revision if isinstance(self.work, GenerateWork) else None

    def _nobody(self, why: WhyNot) -> RequestError:
        """The clear end of a request that no one can take (any more)."""
        if self.started is not None:
            return PeerFailed(
                f"the serving peer failed after {len(self.tokens)} tokens ({self.last_error}) and no other live "
                f"peer serves {self.started.model} at revision {self.started.revision}"
            )
        if isinstance(self.last_error, TooLong):
            if why.why is not Why.ALL_FULL:
                self.last_error.more = self._impossible()
                return self.last_error
        elif self.last_error is not None:
            return self.last_error
        kind = "text" if isinstance(self.work, GenerateWork) else "vectors"
        asked = f"a model for {kind}" if self.work.model is None else f"model {self.work.model!r}"
        match why.why:
            case Why.TOO_LONG:
                return TooLong(f"the request is {why}; ask for fewer tokens", more=self._impossible())
            case Why.ALL_FULL | Why.ALL_BROKEN:
                return NoRoom(f"{asked}: {why}; try again", retry_after_s=why.retry_after_s or NO_ROOM_RETRY_S)
            case Why.NONE_SERVES if (loading := self.around.loading) is not None:
                return NotReady(
                    f"no live peer serves {asked}, and this node is not ready yet: {loading.model} is {loading.state}; "
                    "try again",
                    retry_after_s=NO_ROOM_RETRY_S,
                    more={"loading": loading.told()},
                )
            case Why.NONE_SERVES:
                known = ", ".join(sorted(self.around.served_names())) or NOTHING_SERVED
                return UnknownModel(
                    f"{self._who()} serves {asked}; served now: {known}",
                    param="model",
                    more=self._impossible(),
                )

    def _who(self) -> str:
        """Of whom none serves the model: what the client asked of the route is no fault of the network."""
        if self.route.peer is not None:
            return f"the peer {self.route.peer}, which x-peer names, is not here or not one that"
        if self.route.route is Route.REMOTE:
            return "x-route is remote, and no other node"
        return "x-route is local, and this node is none that" if self.route.route is Route.LOCAL else "no live peer"

    def _impossible(self) -> dict[str, object]:
        """That nobody who is here now could ever answer it, and what is served instead."""
        return {"is_possible": False, "models": sorted(self.around.served_names())}


def pursue(work: GenerateWork | EmbedWork, route: RouteHint, around: Surroundings[H], now: float) -> Pursuit[H]:
    """A request that comes now; `work.remaining_ms` is its time."""
    return Pursuit(work=work, route=route, around=around, deadline=now + work.remaining_ms / 1000)
