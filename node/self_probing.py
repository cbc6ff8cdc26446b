"""Asking the fixed probes of the hosted model, and keeping their first answers in one file.

Rules: through the engine, as the least of all requests: private, so that nothing is kept of them or shared, and counted
in no client's tally. Only while no request is here; who comes meanwhile goes first, and what was answered until then
stands, as long as the weights are the same. The file is written whole; one that cannot be read was moved aside
(crypto/disk.py). Cost is CPU time of this process while a probe runs: an upper bound.
Source: SELF.md, "coherence".
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from crypto.disk import StateFile
from model.step import Priority
from node.errors import RequestError
from node.facts import Probed
from node.hosting import Hosting
from node.requester import Requester
from node.self_probes import (
    ANSWER_TOKENS,
    FILE_BYTES_MAX,
    PROMPTS,
    TEXTS,
    Kept,
    ProbeKey,
    Round,
    agreement,
    decode,
    tokenizer_of,
)
from node.work import EmbedWork, GenerateWork, Piece, Sampling

FILE: Final = "self_probes.state"
REMAINING_MS: Final = 600_000  # no deadline: it gives way by itself
SELF: Final = Requester("self", Priority.STRANGER)
OffLoop = Callable[[Callable[[], Any]], Awaitable[Any]]
_log = logging.getLogger(__name__)


class GaveWay(Exception):
    """Somebody else came, or the weights changed: the round is to be asked on later."""


@dataclass(slots=True)
class _Under:
    """What one revision has answered so far, by prompt."""

    revision: str
    answers: dict[str, tuple[int, ...]]


class Probing:
    """The probes of one hosted model. Its task is `Looks.run` (node/self_looks.py)."""

    def __init__(self, hosting: Hosting, folder: Path, merges: Callable[[], int], off_loop: OffLoop) -> None:
        """folder: of the file; merges: how many rounds of training were merged into the model so far; off_loop: where
        the disk is waited for."""
        self.file = StateFile(folder / FILE, kind="self_probes", version=1, bytes_max=FILE_BYTES_MAX)
        self.probed = ""  # the revision of the last whole round
        self.stored = 0  # first rounds
        self._hosting, self._merges, self._off_loop = hosting, merges, off_loop
        self._kept = Kept()
        self._written = b""
        self._under = _Under("", {})

    async def open(self) -> None:
        """Read the first rounds that were kept, if there are any."""
        self._kept = await self._off_loop(partial(self.file.read, decode)) or Kept()
        self._written = self._kept.encode()

    @property
    def may_ask(self) -> bool:
        """Whether nobody would wait for a probe."""
        return self._hosting.requests_running == 0 and not self._hosting.draining

    async def ask(self) -> Probed | None:
        """A whole round, compared with the first; None: this was the first, and is kept.

        Raises GaveWay, RequestError, ModelError. If cancelled, what was answered until then stands.
        """
        hosting = self._hosting
        key = await hosting.borrow(self._key)
        revision, merges = hosting.revision, self._merges()
        if self._under.revision != revision:
            self._under = _Under(revision, {})
        if hosting.facts("causal") is not None:
            for prompt in PROMPTS:
                if prompt not in self._under.answers:
                    self._under.answers[prompt] = await self._answer(prompt)
        vectors = await self._vectors()
        if hosting.revision != revision:
            raise GaveWay(f"the weights went on from {revision} to {hosting.revision}")
        answers = tuple(self._under.answers.values())
        self._under = _Under("", {})
        self.probed = revision
        return await self._compared(key, Round(revision=revision, merges=merges, answers=answers, vectors=vectors))

    async def _compared(self, key: ProbeKey, now: Round) -> Probed | None:
        first = self._kept.find(key)
        if first is None:
            if (dropped := self._kept.put(key, now)) is not None:
                _log.warning(
                    "the first probes of %s were dropped to make room for those of %s", dropped.model, key.model
                )
            self.stored += 1
        content = self._kept.encode()
        if content != self._written and await self._off_loop(partial(self.file.write, content)):
            self._written = content
        if first is None:
            return None
        found = agreement(first, now)
        return Probed(rounds=found.rounds, answers=found.answers, embeddings=found.embeddings)

    def _key(self) -> ProbeKey:
        """In the engine's thread: the tokenizer belongs to it."""
        runtime, encoder = self._hosting.runtime, self._hosting.facts("encoder")
        return ProbeKey(
            model=runtime.facts.name,
            numbers=runtime.facts.numbers,
            context_tokens=runtime.facts.context_tokens,
            encoder="" if encoder is None else encoder.name,
            encoder_numbers="" if encoder is None else encoder.numbers,
            tokenizer=tokenizer_of([runtime.encode(text) for text in (*PROMPTS, *TEXTS)]),
        )

    async def _answer(self, prompt: str) -> tuple[int, ...]:
        work = GenerateWork(
            request_id="probe",
            text=prompt,
            sampling=Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0),
            private=True,
            remaining_ms=REMAINING_MS,
        )
        tokens = list[int]()
        async with self._hosting.generate(work, SELF) as items:
            async for item in items:
                if isinstance(item, RequestError):
                    raise item
                if isinstance(item, Piece):
                    tokens += item.tokens
                if self._hosting.requests_running > 1 or self._hosting.draining:
                    raise GaveWay("somebody else came, or the node stops")
        return tuple(tokens)

    async def _vectors(self) -> tuple[bytes, ...]:
        if self._hosting.facts("encoder") is None:
            return ()
        work = EmbedWork(request_id="probe", texts=TEXTS, private=True, remaining_ms=REMAINING_MS)
        return (await self._hosting.embed(work, SELF)).vectors
