"""The simulator's questions about who offers what: gossip/finder.py's part, with messages in place of streams.

Rules: the questions, the order of asking and the limits are gossip/finding.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crypto.identity import PeerId
from gossip.finder import ANSWER_S, ANY, LOOK_S, SAMPLE_JITTER
from gossip.finding import (
    ASKED_MAX,
    FOUND_ADVERTS,
    ONWARD_MAX,
    ONWARD_S,
    SAMPLE_ADVERTS,
    SAMPLE_S,
    SEARCH_S,
    Find,
    Search,
    Searches,
    find_of,
    find_to_wire,
)
from tests.simulator_net import Link, Timer

if TYPE_CHECKING:
    from tests.simulator_node import Process


@dataclass(slots=True, eq=False)
class Question:
    """One question to one neighbour; `done` is called once, when the answer's end came or never will."""

    link: Link
    done: Callable[[], None]
    timer: Timer | None = None
    is_over: bool = False

    def end(self) -> None:
        if not self.is_over:
            self.is_over = True
            if self.timer is not None:
                self.timer.cancel()
            self.done()


class Finder:
    """One process's questions and answers."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._searches = Searches()
        self._under_way: dict[str | None, list[Callable[[], None]]] = {}
        self._open: dict[Question, None] = {}
        self.searches = 0  # of our own clients' making
        self.found = 0

    def begin(self) -> None:
        self._process.after(SAMPLE_S * self._process.rng.uniform(1 - SAMPLE_JITTER, 1 + SAMPLE_JITTER), self._sample)

    def find(self, model: str | None, then: Callable[[], None]) -> None:
        """Call `then` when somebody is known, or nobody will be."""
        process = self._process
        if model in self._under_way:
            self._under_way[model].append(then)
            return
        if self._knows(model) or not self._searches.may_search(model or ANY, process.now):
            process.after(0.0, then)
            return
        self.searches += 1
        self._under_way[model] = [then]

        def over() -> None:
            if not self._knows(model):
                self._searches.not_found(model or ANY, process.now)
            self.found += self._knows(model)
            for waiting in self._under_way.pop(model):
                process.after(0.0, waiting)

        find, until = Find(model=model, limit=FOUND_ADVERTS, onward=True), process.now + SEARCH_S

        def begin() -> None:
            if self._neighbours() or process.now >= until:
                self._search(find, Search(self._neighbours(), ASKED_MAX), max(0.0, until - process.now), over)
            else:  # it has just started: the first neighbour is waited for
                process.after(LOOK_S, begin)

        begin()

    def asked(self, link: Link, raw: bytes, question: object) -> None:
        process, find = self._process, find_of(raw)
        asker = link.other(process).peer_id
        if process.peer.actor == "sybil":
            return self._reply(link, process.net.told_by_sybils[: find.limit], question)
        if not process.hearing.may_find(asker, process.now):
            return self._reply(link, [], question)
        if find.model is None:
            own = process.own_advert.raw
            known = [*([own] if own else []), *process.directory.sample(process.now, find.limit, process.rng)]
            return self._reply(link, known[: find.limit], question)
        known = self._serving(find)
        if known or not find.onward or not self._searches.may_ask_onward(process.now):
            return self._reply(link, known, question)
        search = Search([peer for peer in self._neighbours() if peer != asker], ONWARD_MAX)
        onward = Find(model=find.model, limit=find.limit)
        self._search(onward, search, ONWARD_S, lambda: self._reply(link, self._serving(find), question))

    def answered(self, link: Link, raw: bytes, question: object) -> None:
        assert isinstance(question, Question)
        if question.is_over:
            return
        if raw:
            process = self._process
            process.hearing.handed(link.other(process).peer_id, raw, process.now, process.now_ms)
        else:
            self._open.pop(question, None)
            question.end()

    def lost(self, link: Link) -> None:
        """A neighbour is gone, and its answers with it."""
        for question in [each for each in self._open if each.link is link]:
            self._open.pop(question, None)
            question.end()

    def _sample(self) -> None:
        if neighbours := self._neighbours():
            self._ask(neighbours[0], Find(limit=SAMPLE_ADVERTS), lambda: None)
        self.begin()

    def _reply(self, link: Link, adverts: list[bytes], question: object) -> None:
        for raw in adverts:
            self._process.net.send(link, self._process, "found", raw, question)
        self._process.net.send(link, self._process, "found", b"", question)

    def _serving(self, find: Find) -> list[bytes]:
        process = self._process
        assert find.model is not None
        known = process.directory.serving(find.model, process.now, find.limit, process.rng)
        if process.own_advert.raw and process.own_advert.serves(find.model):
            known = [process.own_advert.raw, *known]
        return known[: find.limit]

    def _search(self, find: Find, search: Search, seconds: float, then: Callable[[], None]) -> None:
        """Ask one after the other, a few at once; `then` is called once."""
        is_over = False

        def over() -> None:
            nonlocal is_over
            if not is_over:
                is_over = True
                timer.cancel()
                then()

        def answered() -> None:
            search.answered(is_found=self._knows(find.model))
            go()

        def go() -> None:
            while not is_over and (peer := search.next()) is not None:
                self._ask(peer, find, answered)
            if search.is_over:
                over()

        def look() -> None:
            if self._knows(find.model):
                over()
            elif not is_over:
                self._process.after(LOOK_S, look)

        timer = self._process.after(seconds, over)
        go()
        look()

    def _ask(self, peer: PeerId, find: Find, then: Callable[[], None]) -> None:
        link = self._process.links.get(peer)
        if link is None:
            self._process.after(0.0, then)
            return
        question = Question(link, then)
        self._open[question] = None
        question.timer = self._process.after(ANSWER_S, lambda: self._late(question))
        self._process.net.send(link, self._process, "find", find_to_wire(find), question)

    def _late(self, question: Question) -> None:
        self._open.pop(question, None)
        question.end()

    def _neighbours(self) -> list[PeerId]:
        peers = sorted(self._process.links)
        self._process.rng.shuffle(peers)
        return peers

    def _knows(self, model: str | None) -> bool:
        offers = self._process.directory.offers(self._process.now, model=model)
        return any(offer.capacity.models for offer in offers)
