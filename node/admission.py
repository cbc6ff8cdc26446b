"""Whether a request is admitted to the engine here, by when it would be answered: node/foresight.py over its requests.

Rules: no task and no clock. Who would surely miss its deadline is declined at once, so that another peer is asked
while there is time, or the client told; and nothing is computed for an answer that nobody gets. Surely is by the low
bound, which needs measured turns and outcomes; who is half answered already is never declined, and the engine is never
idle for it: TRIAL_EVERY-th of those declined is admitted all the same, or the first after TRIAL_S, and shows whether
the bound was wrong. An answer that is kept from before is given before anybody is asked here.
Source: SELF.md, "Used"; docs/ARCHITECTURE.md "Decisions that read the self-state".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Final

from model.requests import EngineStatistics
from node.errors import NO_ROOM_RETRY_S, NoRoom
from node.foresight import Foresight, Task
from node.hosting_jobs import Job

TRIAL_EVERY: Final = 16
TRIAL_S: Final = 10.0
RETRY_S_MAX: Final = 60.0

Crowd = Callable[[], float]  # requests that will be active at least, by the node's own prediction; 0: not known


class Admission:
    """What the engine's books tell it, and what it says to who comes."""

    def __init__(self, crowd: Crowd = lambda: 0.0, *, declines: bool = True) -> None:
        """declines: False measures and foretells, and admits everybody."""
        self.foresight = Foresight()
        self.declined = self.trials = 0
        self._crowd, self._declines = crowd, declines
        self._since_trial, self._trial_at = 0, -math.inf
        self._prefilled = 0
        self._token_bytes = [0.0, 0.0]  # of prompts that were read, fading: tokens, and what they took in memory

    def check(self, job: Job, others: Iterable[Job], figures: EngineStatistics, now: float) -> None:
        """A request comes now, and these are here, in the order in which they came. Raises NoRoom."""
        job.came_at = now
        reused = figures.reused_tokens / figures.queried_tokens if figures.queried_tokens else 0.0
        tasks = [self._task(each, reused, now) for each in others]
        if figures.slots_total < 1:
            return
        job.foreseen = foreseen = self.foresight.foresee(
            self._task(job, reused, now), tasks, figures.slots_total, self._crowd()
        )
        left_s = job.work.remaining_ms / 1000
        if foreseen is None or foreseen.low_s is None or foreseen.low_s <= left_s:
            return
        if job.work.delivered or not self._declines or self._may_try(now):
            return
        self.declined += 1
        retry_s = min(RETRY_S_MAX, max(NO_ROOM_RETRY_S, math.ceil(foreseen.low_s - left_s)))
        raise NoRoom(
            f"this node foresees an answer in {foreseen.low_s:.1f} s at the soonest ({len(tasks)} requests are here; "
            f"first token in about {foreseen.first_s:.1f} s), and the request's deadline is in {left_s:.1f} s: give it "
            f"more time, ask for fewer tokens, or try again in {retry_s:.0f} s",
            retry_after_s=retry_s,
        )

    def turned(self, seconds: float, writing: int, figures: EngineStatistics) -> None:
        """A turn of the engine is over, in which so many answers got a token; its figures after it."""
        read, self._prefilled = figures.prefilled_tokens - self._prefilled, figures.prefilled_tokens
        self.foresight.pace.note(seconds, writing, max(0, read))

    def left(self, job: Job, now: float) -> None:
        """A request has left the engine, however it ended."""
        if job.prompt_tokens and not job.work.tokens:
            more = (job.prompt_tokens, job.size)
            self._token_bytes = [0.95 * old + new for old, new in zip(self._token_bytes, more, strict=True)]
        made = job.completion_tokens - len(job.work.delivered)
        if job.wrote and made > 0:
            self.foresight.answered(job.requester, job.completion_tokens, ended=job.reason == "stop")
        if job.foreseen is None or (job.is_failed and not made):
            return
        seconds = (job.wrote_at if job.wrote else now) - job.came_at
        self.foresight.scored(job.requester, job.foreseen, made if job.wrote else 0, seconds)

    def statistics(self) -> dict[str, Any]:
        """JSON for the status: see ForesightStatistics; declines: whether it does; how many, and how many would have
        been and were admitted on trial."""
        return {
            **asdict(self.foresight.statistics()),
            "declines": self._declines,
            "declined": self.declined,
            "trials": self.trials,
        }

    def _may_try(self, now: float) -> bool:
        """Whether this one is admitted on trial, which counts it."""
        self._since_trial += 1
        if self._since_trial < TRIAL_EVERY and now < self._trial_at + TRIAL_S:
            return False
        self._since_trial, self._trial_at = 0, now
        self.trials += 1
        return True

    def _task(self, job: Job, reused: float, now: float) -> Task:
        work, told = job.work, job.told
        if job.wrote:
            unread = 0.0
        else:
            whole = job.prompt_tokens or len(work.tokens or ()) or job.size * self._tokens_a_byte()
            unread = max(0.0, (whole + len(work.delivered)) * (1.0 - reused))
            unread = max(0.0, unread - (told.prefilled_tokens if told is not None else 0))
        made = max(job.completion_tokens, len(work.delivered))
        return Task(
            requester=job.requester,
            prompt_tokens=unread,
            made=made,
            most=max(made + 1, work.sampling.max_tokens),
            left_s=job.came_at + work.remaining_ms / 1000 - now,
            runs=job.wrote or (told is not None and told.queue_position == 0),
        )

    def _tokens_a_byte(self) -> float:
        tokens, size = self._token_bytes
        return tokens / size if size else 0.0
