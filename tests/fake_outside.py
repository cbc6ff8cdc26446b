"""A made-up internet around one node: who answers dial-backs, who gives places at relays. See p2p.reaching.Outside."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from crypto.identity import PeerId
from p2p.errors import Refused, Unreachable
from p2p.relay import RelayDesk, RelayLimits


@dataclass
class FakeOutside:
    """The internet as one node sees it. `open`: addresses where somebody answers; `relays`: who gives places."""

    open: set[str] = field(default_factory=set)
    relays: set[PeerId] = field(default_factory=set)
    offered: bool = True
    place_s: float = 600.0
    dialled: dict[PeerId, str] = field(default_factory=dict)
    probed: list[str] = field(default_factory=list)
    reserved: list[PeerId] = field(default_factory=list)
    left: list[PeerId] = field(default_factory=list)
    announced: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    punched: int = 0

    def __post_init__(self) -> None:
        self.desk = RelayDesk(RelayLimits(), offered=self.offered)

    def dialled_at(self, peer: PeerId) -> str | None:
        return self.dialled.get(peer)

    async def probe(self, address: str) -> None:
        await trio.lowlevel.checkpoint()
        self.probed.append(address)
        if address not in self.open:
            raise Unreachable("nobody there")

    async def reserve(self, relay: PeerId, relay_address: str) -> float:
        await trio.lowlevel.checkpoint()
        self.reserved.append(relay)
        if relay not in self.relays:
            raise Refused(f"the relay {relay} refused: it has no place left")
        return self.place_s

    def leave(self, relay: PeerId) -> None:
        self.left.append(relay)

    def announce(self, addresses: tuple[str, ...]) -> None:
        self.announced = addresses
