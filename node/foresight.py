"""When a request admitted now would be answered: foretold from what the engine's turns and answers have measured.

Rules: core; seconds and counts come in. Nothing is foretold before there are enough of turns, answers and outcomes; a
foretelling is scored against what came, and `low_s` is as far from the expected as what nine of ten outcomes exceed.
How long an answer becomes is not known: `low_s` takes the length that three of four answers exceed, and where nothing
is known of lengths one token, so that nobody is judged by a limit that he will not reach. Each class is judged by its
own answers and outcomes, of which one requester other than this machine's clients gives a quarter at most: no
stranger's answers decide what is foretold to a user. Who waits is taken in the scheduler's order, class by class and
in a class one of each requester in turn: who asks for much is not before who asks for little.
Source: E. L. Kaplan, P. Meier, "Nonparametric estimation from incomplete observations" (1958): an answer that its limit
cut short would have been longer, and who left without a token would have waited longer.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from model.step import Priority
from node.requester import OWN, Requester

WEIGHT: Final = 0.2  # of the newest turn in a mean, as model/chunk_pace.py has it
ANSWERS: Final = 128  # of a class, whose lengths are known
ANSWERS_MIN: Final = 10
OUTCOMES: Final = 32  # of a class: 0.1 of them are three, so that three good ones correct a bound that was wrong
OUTCOMES_MIN: Final = 8
REQUESTER_SHARE: Final = 4  # one requester has one of so many
SOONER: Final = 0.1  # of outcomes that the low bound leaves out, and the high one at its side
SHORTER: Final = 0.25  # of answers that are shorter than the low bound takes them to be
RATIO_MAX: Final = 100.0  # of measured over foretold: more says nothing more
LATER_MAX: Final = 3.0  # of the low bound over what is expected: a bad hour is not held against the next one for long
TURNS_MIN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A request as far as its time goes. prompt_tokens: still to be read; made: tokens of its answer, most: at most.
    left_s: to its deadline, when it leaves. runs: it has a slot."""

    requester: Requester
    prompt_tokens: float
    made: int
    most: int
    left_s: float = math.inf
    runs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """Seconds from now to the first token, and for each further one, as expected; low_s: to the end, at the soonest;
    high_s: to the end of as long an answer as nine of ten are not, at the latest. None: not known."""

    first_s: float
    token_s: float
    low_s: float | None
    high_s: float | None

    def at(self, tokens: int) -> float:
        """Seconds to a token of the answer, the first being 1."""
        return self.first_s + max(0, tokens - 1) * self.token_s


class Pace:
    """How long the engine's turns take."""

    def __init__(self) -> None:
        self._step_s: dict[int, float] = {}  # of a turn without prompts, by how many answers got a token
        self._read_s, self._read_tokens, self._turns = 0.0, 0.0, 0

    def note(self, seconds: float, writing: int, read: int) -> None:
        """A turn: how many answers got a token, and how many tokens of prompts it read."""
        if seconds <= 0.0 or not (writing or read):
            return
        self._turns += 1
        if not read:
            before = self._step_s.get(writing, seconds)
            self._step_s[writing] = before + WEIGHT * (seconds - before)
            return
        more_s = max(0.0, seconds - (self.step_s(writing) or 0.0))
        self._read_s += more_s - WEIGHT * self._read_s
        self._read_tokens += read - WEIGHT * self._read_tokens

    @property
    def is_known(self) -> bool:
        """Whether enough turns were seen, of both kinds."""
        return self._turns >= TURNS_MIN and bool(self._step_s) and self._read_tokens > 0.0

    @property
    def read_s(self) -> float:
        """Of one token of a prompt."""
        return self._read_s / self._read_tokens if self._read_tokens else 0.0

    def step_s(self, writing: int) -> float | None:
        """Of a turn in which so many answers get a token; beyond what was measured, not more than it would be."""
        if not writing or not self._step_s:
            return None
        if (exact := self._step_s.get(writing)) is not None:
            return exact
        fewer = max((known for known in self._step_s if known < writing), default=0)
        more = min((known for known in self._step_s if known > writing), default=0)
        if not fewer:
            return self._step_s[more] * writing / more
        if not more:
            return self._step_s[fewer]
        low, high = self._step_s[fewer], self._step_s[more]
        return low + (high - low) * (writing - fewer) / (more - fewer)


class _Ends:
    """The newest values of one class, some of them cut short, and the share that is beyond each.

    A requester's own make room for those beyond its share."""

    def __init__(self, most: int) -> None:
        self._kept: deque[tuple[Requester, float, bool]] = deque()
        self._most = most
        self._ends: list[float] = []
        self._beyond: list[float] = []

    def add(self, who: Requester, value: float, *, ended: bool) -> None:
        """ended: False, if it was cut short there."""
        own = [kept for kept in self._kept if kept[0] == who]
        if who != OWN and len(own) >= self._most // REQUESTER_SHARE:
            self._kept.remove(own[0])
        elif len(self._kept) >= self._most:
            self._kept.popleft()
        self._kept.append((who, value, ended))
        self._ends, self._beyond, share = [], [], 1.0
        values = sorted((value, not ended) for _, value, ended in self._kept)
        for place, (end, is_cut) in enumerate(values):
            if not is_cut:
                share *= 1.0 - 1.0 / (len(values) - place)
                self._ends.append(end)
                self._beyond.append(share)

    def __len__(self) -> int:
        return len(self._kept)

    def at(self, share: float, beyond: float = 0.0) -> float:
        """Before which this share of those ends that are beyond a value; infinite: not as far as is known."""
        place = bisect_right(self._ends, beyond)
        left = (self._beyond[place - 1] if place else 1.0) * (1.0 - share)
        while place < len(self._ends):
            if self._beyond[place] <= left:
                return self._ends[place]
            place += 1
        return math.inf


class Lengths:
    """How long answers become, in tokens."""

    def __init__(self) -> None:
        self._ends = _Ends(ANSWERS)

    def note(self, who: Requester, tokens: int, *, ended: bool) -> None:
        """An answer of so many tokens; ended: by itself, else it was cut short there."""
        self._ends.add(who, float(tokens), ended=ended)

    def at(self, share: float, made: int, most: int) -> int:
        """The length below which this share of the answers ends that are longer than `made`, at most `most`."""
        if len(self._ends) < ANSWERS_MIN:
            return min(most, made + 1)
        return max(made + 1, int(min(most, self._ends.at(share, made))))


class Scores:
    """Measured over foretold, of the newest outcomes."""

    def __init__(self) -> None:
        self._ends = _Ends(OUTCOMES)
        self.outcomes = 0
        self.error_s: float | None = None
        self.inside = 0  # of the outcomes that had bounds
        self.bounded = 0

    def note(self, who: Requester, foreseen: Foreseen, tokens: int, seconds: float) -> None:
        """So many tokens came in so many seconds; 0 tokens: not even the first in that time."""
        told_s = max(foreseen.at(max(1, tokens)), 1e-6)
        self._ends.add(who, min(RATIO_MAX, seconds / told_s), ended=tokens > 0)
        if not tokens:
            return
        self.outcomes += 1
        error_s = abs(seconds - told_s)
        self.error_s = error_s if self.error_s is None else self.error_s + WEIGHT * (error_s - self.error_s)
        if foreseen.low_s is not None and foreseen.high_s is not None:
            self.bounded += 1
            self.inside += foreseen.low_s <= seconds <= foreseen.high_s

    def bounds(self) -> tuple[float, float] | None:
        """What a foretold time is multiplied by to be at the soonest, and at the latest; None: too few outcomes."""
        if len(self._ends) < OUTCOMES_MIN:
            return None
        return min(LATER_MAX, self._ends.at(SOONER)), min(RATIO_MAX, self._ends.at(1.0 - SOONER))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForesightStatistics:
    """outcomes: of foretellings, all classes; error_s: mean |measured - foretold| of the newest, of the worst class;
    inside: share of outcomes between the bounds of those that had any; sooner, later: the bounds of own clients'
    as parts of what is foretold. None: not known yet."""

    outcomes: int
    error_s: float | None
    inside: float | None
    sooner: float | None
    later: float | None
    step_s: float | None  # of one answer alone
    read_s: float | None  # of one token of a prompt


class Foresight:
    """Everything measured, and what it foretells."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._lengths = {priority: Lengths() for priority in Priority}
        self._scores = {priority: Scores() for priority in Priority}

    def answered(self, who: Requester, tokens: int, *, ended: bool) -> None:
        """An answer of so many tokens; ended: by itself."""
        self._lengths[who.priority].note(who, tokens, ended=ended)

    def scored(self, who: Requester, foreseen: Foreseen, tokens: int, seconds: float) -> None:
        """What came of what was foretold: so many tokens after so many seconds."""
        self._scores[who.priority].note(who, foreseen, tokens, seconds)

    def foresee(self, newcomer: Task, others: Sequence[Task], slots: int, crowd: float = 0.0) -> Foreseen | None:
        """What becomes of it beside these, in the order in which they came. crowd: requests that will be active all
        the while, whoever they are. None: too little was measured."""
        if not self.pace.is_known:
            return None
        lengths, bounds = self._lengths[newcomer.requester.priority], self._scores[newcomer.requester.priority].bounds()
        least = lengths.at(SHORTER, newcomer.made, newcomer.most) - newcomer.made
        first_s, end_s = self._played(newcomer, least, others, max(1, slots), crowd)
        token_s = (end_s - first_s) / (least - 1) if least > 1 else self.pace.step_s(self._beside(others, slots)) or 0.0
        expected = Foreseen(first_s=first_s, token_s=token_s, low_s=None, high_s=None)
        if bounds is None:
            return expected
        most = lengths.at(1.0 - SOONER, newcomer.made, newcomer.most) - newcomer.made
        low_s = bounds[0] * end_s
        high_s = max(low_s, bounds[1] * expected.at(most))
        return Foreseen(first_s=first_s, token_s=token_s, low_s=low_s, high_s=high_s)

    def statistics(self) -> ForesightStatistics:
        """How well it foretells."""
        scores = list(self._scores.values())
        errors = [each.error_s for each in scores if each.error_s is not None]
        bounded, own = sum(each.bounded for each in scores), self._scores[Priority.OWN].bounds()
        return ForesightStatistics(
            outcomes=sum(each.outcomes for each in scores),
            error_s=max(errors, default=None),
            inside=sum(each.inside for each in scores) / bounded if bounded else None,
            sooner=None if own is None else own[0],
            later=None if own is None else own[1],
            step_s=self.pace.step_s(1),
            read_s=self.pace.read_s if self.pace.is_known else None,
        )

    @staticmethod
    def _beside(others: Sequence[Task], slots: int) -> int:
        return min(max(1, slots), 1 + sum(each.runs for each in others))

    def _played(
        self, newcomer: Task, least: int, others: Sequence[Task], slots: int, crowd: float
    ) -> tuple[float, float]:
        """Seconds to its first token, and to the `least`-th: one turn gives each who runs a token, a prompt's reading
        holds up everybody, and whoever ends, or has waited to its deadline, leaves a slot or the queue."""
        now_s, turn, first_s = 0.0, 0, 0.0
        running: list[tuple[int, bool]] = []  # the turn at which it ends, and whether it is the newcomer

        def runs(task: Task) -> None:
            nonlocal now_s
            now_s += task.prompt_tokens * self.pace.read_s
            turn_s = self._turn_s(len(running) + 1, slots, crowd)
            tokens = least if task is newcomer else min(self._left(task), _turns(task.left_s - now_s, turn_s))
            heapq.heappush(running, (turn + tokens, task is newcomer))

        for each in others:
            if each.runs:
                runs(each)
        queue = deque(_in_turn([each for each in others if not each.runs], newcomer, others))
        while True:
            while queue and len(running) < slots:
                each = queue.popleft()
                if each is not newcomer and each.left_s <= now_s:
                    continue
                runs(each)
                if each is newcomer:
                    first_s = now_s + self._turn_s(len(running), slots, crowd)
            end, is_it = heapq.heappop(running)
            now_s += (end - turn) * self._turn_s(len(running) + 1, slots, crowd)
            turn = end
            if is_it:
                return first_s, max(first_s, now_s)

    def _turn_s(self, running: int, slots: int, crowd: float) -> float:
        return self.pace.step_s(min(slots, max(running, int(crowd)))) or 0.0

    def _left(self, task: Task) -> int:
        """Tokens that are still to come, as of an answer of middling length."""
        return self._lengths[task.requester.priority].at(0.5, task.made, task.most) - task.made


def _turns(seconds: float, turn_s: float) -> int:
    """So many turns fit in, one at least."""
    return max(1, int(min(seconds / turn_s, 1e9))) if turn_s > 0.0 else 1


def _in_turn(waiting: Iterable[Task], newcomer: Task, others: Sequence[Task]) -> list[Task]:
    """Who is given a slot next, before whom."""
    has = Counter(each.requester for each in others if each.runs)
    keyed = []
    for number, each in enumerate((*waiting, newcomer)):
        has[each.requester] += 1
        keyed.append(((each.requester.priority, has[each.requester], number), each))
    return [each for _, each in sorted(keyed, key=lambda pair: pair[0])]
