"""Votes of one round in the hands of an adversary: it decides what arrives when, whose time is up, what liars say.

Rules: the voters are gossip/agreement.py. Messages wait in a pool; each turn one of them reaches one voter, or the time
of one is up, or a liar tells one voter anything at all, or a voter loses what it did not keep. All is drawn. At the end
everybody asks everybody what it heard, again and again, and somebody must decide; all who decide, the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.agreement import Agreement, Check, Decided, Effect, Lack, Place, Saved, Say, Timing, Value
from gossip.electors import Electors, Terms, liars_max
from gossip.rounds import Precommit, Prevote, Proposal, Vote

RUN, BASE = bytes(32), digest(b"base")
TIMING = Timing(propose_s=3.0, vote_s=1.0, growth_s=0.5)
ROUNDS_AT_END = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was decided by whom, and what went wrong."""

    decided: dict[PeerId, Digest]
    views_max: int
    wrong: tuple[str, ...]


class Votes:
    """One history."""

    def __init__(self, seed: int, voters: int = 4) -> None:
        self.rng = rng = random.Random(seed)
        # a message arrives, a time is up, a liar speaks, a voter restarts: how often
        self._weights = (1.0, rng.choice((0.02, 0.1, 0.3)), rng.choice((0.2, 0.6, 1.0)), rng.choice((0.0, 0.02)))
        self._withheld = rng.choice((0.0, 0.3, 0.6))
        self._bias = rng.choice((0.5, 0.9))  # how often a liar names what is to be voted on, rather than anything
        names = [PeerId(f"v{number}") for number in range(voters)]
        self.electors = Electors.of_founders(names, Terms())
        self.liars = set(self.rng.sample(names, liars_max(voters)))
        self.now = 0.0
        self.saved: dict[PeerId, Saved] = {}
        self.heard: dict[PeerId, list[tuple[PeerId, Proposal | Vote]]] = {name: [] for name in names}
        self.honest = {name: self._voter(name, None) for name in names if name not in self.liars}
        self.pool: list[tuple[PeerId, PeerId, Proposal | Vote]] = []  # (sender, receiver, body)
        self.all: list[tuple[PeerId, Proposal | Vote]] = []
        self.decided: dict[PeerId, Digest] = {}
        self.wrong: list[str] = []
        self.views_max = 0
        self.values = [Value(digest(b"value %d" % n), (digest(b"report %d" % n),)) for n in range(2)]

    def _voter(self, name: PeerId, saved: Saved | None) -> Agreement:
        place = Place(run=RUN, round=0, base=BASE, electors=self.electors, own=name)
        return Agreement(place, TIMING, saved)

    def run(self, turns: int = 400) -> Outcome:
        for name, voter in self.honest.items():
            self._do(name, voter.begin(self.now))
            self._do(name, voter.offer(self.rng.choice(self.values), self.now))
        for _ in range(turns):
            self._turn()
        self._end()
        if not self.decided:
            self.wrong.append("nobody ever decided")
        if len(set(self.decided.values())) > 1:
            self.wrong.append(f"two decisions: { {who: what.hex()[:6] for who, what in self.decided.items()} }")
        return Outcome(decided=self.decided, views_max=self.views_max, wrong=tuple(self.wrong))

    def _turn(self) -> None:
        """Weights are of: a message arrives, a time is up, a liar speaks, a voter restarts."""
        act = self.rng.choices((self._arrive, self._time_out, self._lie, self._restart), self._weights)[0]
        act()

    def _arrive(self) -> None:
        """Any message, if it is not withheld."""
        if self.pool:
            sender, receiver, body = self.pool.pop(self.rng.randrange(len(self.pool)))
            if self.rng.random() >= self._withheld:
                self._give(sender, receiver, body)

    def _time_out(self) -> None:
        """A voter's clock is ahead of all others: whatever it waits for is over."""
        name = self.rng.choice(list(self.honest))
        voter = self.honest[name]
        if voter.deadline() < float("inf"):
            self.now = max(self.now, voter.deadline())
            self._do(name, voter.tick(self.now))

    def _restart(self) -> None:
        name = self.rng.choice(list(self.honest))
        if name not in self.decided:
            voter = self.honest[name] = self._voter(name, self.saved.get(name))
            self._do(name, voter.begin(self.now))
            self._do(name, voter.offer(self.rng.choice(self.values), self.now))

    def _lie(self) -> None:
        """A liar tells one voter something."""
        rng = self.rng
        if not self.liars:
            return
        liar, target = rng.choice(sorted(self.liars)), rng.choice(list(self.honest))
        view = max(0, self.honest[target].view + rng.choice((-2, -1, 0, 0, 0, 1)))
        value = rng.choice(self.values)
        proposed = [Digest(body.manifest) for _, body in self.all if isinstance(body, Proposal) and body.view == view]
        named = rng.choice(proposed or [value.manifest])
        if rng.random() >= self._bias:
            named = rng.choice([None, value.manifest, digest(b"invented")])
        place = {"run": RUN, "round": 0, "base": BASE, "view": view}
        body: Proposal | Vote
        if self.electors.proposer(BASE, view) == liar and rng.random() < 0.5:
            valid_view = rng.randrange(-1, view) if view else -1
            body = Proposal(**place, valid_view=valid_view, manifest=value.manifest, reports=value.reports)  # type: ignore[arg-type]
        else:
            body = rng.choice((Prevote, Precommit))(**place, manifest=named)  # type: ignore[arg-type]
        self._give(liar, target, body)

    def _give(self, sender: PeerId, receiver: PeerId, body: Proposal | Vote) -> None:
        voter = self.honest[receiver]
        self.heard[receiver].append((sender, body))
        self._do(receiver, voter.receive(sender, body, self.now))

    def _do(self, name: PeerId, effects: list[Effect]) -> None:
        voter = self.honest[name]
        self.views_max = max(self.views_max, voter.view)
        self.saved[name] = voter.save()  # on disk before anything is said
        for effect in effects:
            match effect:
                case Say(body):
                    self.heard[name].append((name, body))
                    self.all.append((name, body))
                    self.pool += [(name, other, body) for other in self.honest if other != name]
                case Check(value, _):
                    is_sound = value in self.values
                    self._do(name, voter.judge(value, is_sound, self.now))
                case Lack(proposer, view):
                    if proposer in self.honest:  # it has them, or lies
                        heard = [each for each in self.heard[proposer] if each[1].view == view]
                        self.pool += [(sender, name, body) for sender, body in heard]
                case Decided(manifest, view):
                    self.decided[name] = manifest
                    if len(voter.precommitted(manifest, view)) < self.electors.quorum:
                        self.wrong.append(f"{name} decided without a quorum")

    def _end(self) -> None:
        """The network is good again: everything is said again and arrives, and time passes."""
        for _ in range(ROUNDS_AT_END):
            if self.decided:
                return  # who lacks the proof is given it (gossip/averaging.py)
            heard = list(dict.fromkeys((sender, body) for each in self.heard.values() for sender, body in each))
            for sender, body in heard:
                for receiver in self.honest:
                    if receiver != sender:
                        self._give(sender, receiver, body)
            due = min((voter.deadline() for voter in self.honest.values()), default=self.now)
            self.now = max(self.now, due) if due < float("inf") else self.now
            for name, voter in self.honest.items():
                self._do(name, voter.tick(self.now))
