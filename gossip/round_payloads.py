"""The payloads and states of one run that this node has: offered to the others for some rounds, then let go.

Rules: a shell over gossip/blobs.py. Own payloads are files in the run's folder, so that a restart finds what was
announced. A payload that came is offered as well, under the name that was announced or not at all, so that who is
slow, or joins, has several donors. A state is a file of the owner's. What is let go is withdrawn first, and removed
when it was fetched here, whole or in part; what a kill left, when the next run begins.
Source: TRAINING.md 3 (1, 6).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crypto.digest import Digest
from crypto.identity import PeerId
from gossip.blob_serving import Allowed
from gossip.blobs import Blobs
from gossip.errors import CannotStore, LocalProtocolError, RemoteProtocolError
from gossip.rounds import Manifest
from gossip.transfer import Manifest as Made

OWN = "own-"  # and the number of the round
OFFERED_MAX = 4096  # payloads, of all rounds; half of what a node offers at most
STATES_KEPT = 2  # at least: the newest that a quorum names, and the one that comes after it

_log = logging.getLogger(__name__)


class Payloads:
    """One run's, by the digest of a blob. Whoever asks twice at once for one shares the fetch."""

    def __init__(
        self, blobs: Blobs, folder: Path, rounds_kept: int, allowed: Allowed, *, states_kept: int = STATES_KEPT
    ) -> None:
        """folder: for own payloads. rounds_kept: for how many rounds a payload is there for those who catch up.
        states_kept: how many states are offered; who joins over a slow line has so many rounds to fetch one.

        allowed: to whom they may be given.
        """
        self._blobs, self._folder, self.rounds_kept = blobs, folder, max(1, rounds_kept)
        self._states_kept = max(STATES_KEPT, states_kept)
        self._allowed = allowed
        self._paths: dict[Digest, Path] = {}
        self._rounds: dict[int, set[Digest]] = {}
        self._states: list[Digest] = []  # the oldest first

    async def restore(self, newest: Collection[Manifest], others: Iterable[Digest]) -> None:
        """After a restart: offer what is here of the newest rounds, and of the one to come, and remove all else.

        others: what else may be here, in part.
        """
        blobs = {Digest(share.blob): each.round for each in newest for share in each.shares if share.blob is not None}
        roots = {Digest(each.root) for each in newest if each.root is not None}
        own: dict[Path, tuple[int, Digest | None]] = {path: (number, None) for number, path in self._own_files()}
        try:
            whole = await self._blobs.sweep({*blobs, *roots, *others})
        except CannotStore as exc:
            return _log.warning("what was fetched before cannot be looked through: %s", exc)
        fetched = {self._blobs.path(blob): (blobs[blob], blob) for blob in whole & blobs.keys()}
        for path, (number, blob) in {**own, **fetched}.items():
            try:
                self._note(number, await self._offer(path, blob), path)
            except (CannotStore, RemoteProtocolError) as exc:
                _log.warning("a payload of round %d is not offered again: %s", number, exc)

    def own_path(self, number: int) -> Path:
        """Where this member's own payload of a round is to be written, before it is announced."""
        return self._folder / f"{OWN}{number}"

    async def add_own(self, number: int, made_of: Made | None = None) -> Digest:
        """Offer own payload of a round. made_of: as it was written a moment ago. Raises CannotStore."""
        await self._make_room(number)
        path = self.own_path(number)
        return self._note(number, await self._offer(path, None, made_of), path)

    def has(self, blob: Digest) -> bool:
        """Whether a payload is here and whole."""
        path = self._paths.get(blob)
        return path is not None and path.exists()

    async def get(self, number: int, blob: Digest, holders: Iterable[PeerId], bytes_max: int) -> Path:
        """A payload of a round, from here or from these. What came of it is let go with its round.

        Raises Unavailable, CannotStore (TooLarge: it has more bytes), RemoteProtocolError (nobody can give it on).
        """
        await self._make_room(number)
        self._rounds.setdefault(number, set()).add(blob)
        if self.has(blob):
            return self._paths[blob]
        path = await self._blobs.fetch(blob, holders, bytes_max=bytes_max)
        try:
            with _as_storage(path):
                await self._blobs.offer_fetched(blob, self._allowed)
        except CannotStore as exc:  # it is here all the same
            _log.warning("a payload of round %d is not given on: %s", number, exc)
        self._note(number, blob, path)
        return path

    async def offer_state(self, path: Path, made_of: Made) -> Digest:
        """Offer the weights of a round to come, which were written a moment ago; their name. Raises CannotStore."""
        return self._keep_state(await self._offer(path, None, made_of))

    async def offer_again(self, states: Iterable[tuple[Path, Digest]]) -> None:
        """After a restart: weights of before, each by the name that a quorum gave it, the newest last."""
        for path, root in states:
            try:
                self._keep_state(await self._offer(path, root))
            except (CannotStore, RemoteProtocolError) as exc:
                _log.warning("the weights in %s are not offered again: %s", path, exc)

    def _keep_state(self, root: Digest) -> Digest:
        """It is the newest now."""
        if root in self._states:
            self._states.remove(root)
        self._states.append(root)
        while len(self._states) > self._states_kept:
            self._blobs.withdraw(self._states.pop(0))
        return root

    async def get_state(self, root: Digest, holders: Iterable[PeerId], bytes_max: int) -> Path:
        """Weights by their name. Raises Unavailable, CannotStore."""
        return await self._blobs.fetch(root, holders, bytes_max=bytes_max)

    async def forget(self, blob: Digest) -> None:
        """It is of no use any more."""
        self._blobs.withdraw(blob)
        self._paths.pop(blob, None)
        await self._blobs.forget(blob)

    async def over(self, number: int) -> None:
        """This round is committed and applied: what is too old goes. Raises CannotStore; what stayed goes next time."""
        for old in [each for each in self._rounds if each <= number - self.rounds_kept]:
            await self._let_go(old)
        try:
            for own, path in self._own_files():
                if own <= number - self.rounds_kept:
                    path.unlink(missing_ok=True)
        except OSError as exc:
            raise CannotStore(f"own payloads in {self._folder} cannot be removed: {exc.strerror}") from exc

    async def _let_go(self, old: int) -> None:
        """Raises CannotStore."""
        for blob in list(self._rounds[old]):
            if not any(blob in others for each, others in self._rounds.items() if each != old):
                await self.forget(blob)
        del self._rounds[old]

    async def _make_room(self, number: int) -> None:
        """In a run of very many members payloads are kept for fewer rounds. Raises CannotStore."""
        while sum(map(len, self._rounds.values())) >= OFFERED_MAX and (oldest := min(self._rounds)) < number:
            await self._let_go(oldest)

    def close(self) -> None:
        """Offer nothing any more; the files stay."""
        for blob in (*self._paths, *self._states):
            self._blobs.withdraw(blob)

    def _note(self, number: int, blob: Digest, path: Path) -> Digest:
        self._paths[blob] = path
        self._rounds.setdefault(number, set()).add(blob)
        return blob

    def _own_files(self) -> list[tuple[int, Path]]:
        named = [(path.name.removeprefix(OWN), path) for path in self._folder.glob(f"{OWN}*")]
        return [(int(text), path) for text, path in named if text.isdecimal()]

    async def _offer(self, path: Path, named: Digest | None, made_of: Made | None = None) -> Digest:
        """Raises CannotStore, RemoteProtocolError."""
        with _as_storage(path):
            return await self._blobs.offer_file(path, self._allowed, named=named, manifest=made_of)


@contextmanager
def _as_storage(path: Path) -> Iterator[None]:
    """Raises CannotStore for what keeps a file from being offered."""
    try:
        yield
    except (OSError, LocalProtocolError) as exc:
        raise CannotStore(f"{path} cannot be offered: {exc}") from exc
