"""Finding nodes on the same machine and LAN by multicast DNS: the door to the zeroconf package.

Rules: zeroconf runs threads and an event loop of its own; nothing of it is touched from the Trio thread. It is
imported, started and stopped in worker threads, and what it hears comes back by the Trio token. Only the interfaces
we listen on are used. Whatever the LAN says is checked like anything from a stranger. No multicast is no error: the
status says so.
Source: RFC 6762, RFC 6763 section 6 (TXT records); https://python-zeroconf.readthedocs.io.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import trio

from crypto.identity import PeerId
from p2p.address import Address, Scope, parse_address, told
from p2p.errors import BadAddress

if TYPE_CHECKING:
    import zeroconf

SERVICE_TYPE = "_openagi._tcp.local."
ADDRESSES_MAX = 6  # an answer should fit one packet of 1,300 bytes
TXT_VALUE_BYTES_MAX = 200  # a TXT string holds 255 with its key
RESOLVE_TIMEOUT_MS = 3000
STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What we say of ourselves; `addresses` are whole multiaddrs."""

    peer: PeerId
    network: str
    protocol: int
    instance: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A node that was seen on the LAN; `addresses` are those that can be dialled."""

    peer: PeerId
    network: str
    protocol: int
    instance: str
    addresses: tuple[Address, ...]


def announced(addresses: tuple[str, ...]) -> list[Address]:
    """The addresses worth announcing: those of the LAN, or loopback where there are no others."""
    parsed = []
    for text in addresses:
        with contextlib.suppress(BadAddress):
            parsed.append(parse_address(text))
    far = [address for address in parsed if address.scope in (Scope.PRIVATE, Scope.PUBLIC)]
    return (far or [address for address in parsed if address.scope is Scope.LOOPBACK])[:ADDRESSES_MAX]


def to_txt(announcement: Announcement) -> dict[str, str]:
    """The TXT record of an announcement."""
    txt = {
        "v": str(announcement.protocol),
        "net": announcement.network,
        "peer": announcement.peer,
        "inst": announcement.instance,
    }
    for index, address in enumerate(announced(announcement.addresses)):
        txt[f"a{index}"] = address.bare
    return txt


def read_txt(txt: Mapping[str, str | None]) -> Sighting | None:
    """The node that a TXT record tells of; None when it is not one of ours or makes no sense. Never raises."""
    fields = {key: value for key, value in txt.items() if value and len(value) <= TXT_VALUE_BYTES_MAX}
    version, peer, instance = fields.get("v", ""), fields.get("peer", ""), fields.get("inst", "")
    if not (version.isascii() and version.isdigit()) or len(version) > 6 or not instance or len(instance) > 64:
        return None
    bare = [fields[key] for key in (f"a{index}" for index in range(ADDRESSES_MAX)) if key in fields]
    # the LAN's multicast cannot be heard from farther away, so a private address is believed, a loopback one as well
    addresses = told([f"{text}/p2p/{peer}" for text in bare], PeerId(peer), Scope.LOOPBACK)
    if not addresses:
        return None
    return Sighting(
        peer=PeerId(peer),
        network=fields.get("net", "")[:64],
        protocol=int(version),
        instance=instance,
        addresses=tuple(addresses),
    )


class _Listener:
    """What zeroconf's browser thread calls."""

    def __init__(self, own_name: str, token: trio.lowlevel.TrioToken, deliver: Callable[[Sighting], None]) -> None:
        self._own_name = own_name
        self._token = token
        self._deliver = deliver

    def add_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        """A node appeared."""
        if name == self._own_name:
            return
        info = zc.get_service_info(type_, name, timeout=RESOLVE_TIMEOUT_MS)
        sighting = read_txt(info.decoded_properties) if info is not None else None
        if sighting is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._deliver, sighting)

    def update_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        """A node changed what it says."""
        self.add_service(zc, type_, name)

    def remove_service(self, zc: zeroconf.Zeroconf, type_: str, name: str) -> None:
        """A node said goodbye; its connection will say so too."""


class _Responder:
    """zeroconf's objects. `start` and `stop` block and run in worker threads, `stop` perhaps before `start` is over."""

    def __init__(self, announcement: Announcement) -> None:
        self.name = f"{announcement.peer[-12:]}-{announcement.instance[:12]}.{SERVICE_TYPE}"
        self._announcement = announcement
        self._lock = threading.Lock()  # start and stop meet in two threads
        self._stopping = False
        self._zc: zeroconf.Zeroconf | None = None
        self._browser: zeroconf.ServiceBrowser | None = None

    def start(self, listener: _Listener) -> str:
        """Import, announce, browse. Returns '' or what prevents it."""
        # zeroconf puts whole tracebacks of a lost interface on stderr; the status has a sentence instead
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        import zeroconf  # 0.1 s and 17 MB that `--no-mdns` does not pay

        own = announced(self._announcement.addresses)
        try:
            with self._lock:
                if self._stopping:
                    return "stopped"
                self._zc = zeroconf.Zeroconf(interfaces=interfaces(self._announcement.addresses))
            info = zeroconf.ServiceInfo(
                SERVICE_TYPE,
                self.name,
                port=own[0].port,
                properties=to_txt(self._announcement),
                parsed_addresses=[address.host for address in own],
                server=f"{self.name.removesuffix(SERVICE_TYPE)}local.",
            )
            # the name holds a random instance: probing for another owner would only cost a second
            self._zc.register_service(info, cooperating_responders=True)
            with self._lock:
                if self._stopping:
                    return "stopped"
                # not a subclass of their ServiceListener, which would import zeroconf with this file
                hears = cast("zeroconf.ServiceListener", listener)
                self._browser = zeroconf.ServiceBrowser(self._zc, SERVICE_TYPE, listener=hears)
        except (OSError, zeroconf.Error, AssertionError) as exc:
            self.stop()
            return f"no multicast on {', '.join(interfaces(self._announcement.addresses))}: {exc or type(exc).__name__}"
        return ""

    def stop(self) -> None:
        """Say goodbye to the LAN and end the threads. Twice does no harm."""
        with self._lock:
            self._stopping = True
            zc, browser, self._zc, self._browser = self._zc, self._browser, None, None
        if browser is not None:
            browser.cancel()
        if zc is not None:
            zc.close()


def interfaces(addresses: tuple[str, ...]) -> list[str]:
    """The IPv4 addresses of the interfaces that we listen on: multicast goes out there and nowhere else."""
    found = []
    for text in addresses:
        with contextlib.suppress(BadAddress):
            address = parse_address(text)
            if ":" not in address.host and address.scope is not Scope.NAMED:
                found.append(address.host)
    return list(dict.fromkeys(found))


async def run_mdns(
    announcement: Announcement,
    on_sighting: Callable[[Sighting], None],
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Announce ourselves and report every other node seen, until cancelled; says at start '' or why it cannot.

    `on_sighting` is called in the Trio thread and must not raise. Cancelled, it says goodbye, shielded, and is over
    within STOP_TIMEOUT_S.
    """
    if not interfaces(announcement.addresses):
        task_status.started("no IPv4 interface to listen on")
        return
    responder = _Responder(announcement)
    listener = _Listener(responder.name, trio.lowlevel.current_trio_token(), on_sighting)
    try:
        problem = await trio.to_thread.run_sync(responder.start, listener, abandon_on_cancel=True)
        task_status.started(problem)
        if not problem:
            await trio.sleep_forever()
    finally:
        with trio.move_on_after(STOP_TIMEOUT_S, shield=True):
            await trio.to_thread.run_sync(responder.stop, abandon_on_cancel=True)
