"""What answers here, as the rest of the node sees it: a model in this process, or a server behind it.

Rules: no more than an interface: node/hosting.py and node/upstream.py keep to it.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from model.config import ModelFacts
from model.requests import EngineStatistics
from model.runtime_face import Served
from node.errors import RequestError
from node.requester import OWN, Requester
from node.work import AnswerItem, Embedded, EmbedWork, GenerateWork


class Backend(Protocol):
    """Admission of requests to what answers here. See node.hosting.Hosting for what each one does."""

    draining: bool

    @property
    def runtime(self) -> Served:
        """What is served."""

    @property
    def accepting(self) -> bool:
        """Whether it takes new requests of peers."""

    @property
    def revision(self) -> str:
        """Of the main model, now."""

    @property
    def requests_running(self) -> int:
        """Requests admitted and not ended."""

    @property
    def embeds_waiting(self) -> int:
        """Embedding requests not ended."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the work; started when requests can be answered."""

    def details(self) -> dict[str, Any]:
        """What the status says of its model beside the rest."""

    def told(self) -> dict[str, Any]:
        """JSON for the status: kind, problem ('' for none), and what else there is to say."""

    def statistics(self) -> EngineStatistics:
        """The figures of what answers."""

    async def wait_idle(self) -> None:
        """Wait until no request is admitted, and the owner of each has taken its last item."""

    def facts(self, kind: str) -> ModelFacts | None:
        """The model that answers requests of a kind, None when there is none."""

    def serves(self, model: str | None, revision: str | None, kind: str) -> bool:
        """Whether a request for this model and revision can be answered here at all."""

    def has_room(self) -> bool:
        """Whether a request admitted now would start at once."""

    def generate(
        self, work: GenerateWork, requester: Requester = OWN
    ) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[AnswerItem | RequestError]]:
        """Admit a request; its items, an error as the last one. Leaving the block cancels it."""

    async def embed(self, work: EmbedWork, requester: Requester = OWN) -> Embedded:
        """Embed texts. Raises RequestError."""
