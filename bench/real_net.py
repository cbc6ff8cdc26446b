"""Hosts for the real swarm: network namespaces around a router, with cuts, narrow cables and a slow, lossy link.

Rules: every namespace here was made here and is deleted at the end, however that comes about. Each host has one cable
(veth) to the router. A cut is a policy rule in the router that drops packets without a word, in the directions that
are named; a narrow cable is a token bucket (tbf) at both its ends; the slow link is bench/tun_link.py, a process
between two TUN devices whose routes win while it lives. Needs root, iproute2 and /dev/net/tun; `why_not` says which is
missing. A thread enters a host by setns, and so does all that it opens.
Source: ip-rule(8), ip-netns(8), tc-tbf(8); setns(2).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

NETNS = Path("/run/netns")
CLONE_NEWNET = 0x40000000
NET = "10.77"  # of hosts that nobody else sees
BURST = "32kb"  # of the token bucket: some frames of an Ethernet
QUEUE = "200ms"  # what waits longer for the token bucket is dropped
SAY_S_MAX = 10.0  # for the link to say that it is there

T = TypeVar("T")


def run(*words: str) -> None:
    """A command that must succeed. Raises OSError, CalledProcessError with its words."""
    subprocess.run(words, check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why namespaces cannot be made here; '' when they can."""
    name = f"try{os.getpid()}"
    try:
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        run("ip", "-n", name, "rule", "add", "blackhole", "from", "10.77.250.0/24")
    except OSError as exc:
        return f"iproute2 is needed: {exc.strerror}"
    except subprocess.CalledProcessError as exc:
        return f"root and a kernel with namespaces, veth and policy rules are needed: {exc.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    return ""


def why_not_narrow(fabric: Fabric) -> str:
    """Why a cable cannot be made narrow here; '' when it can."""
    try:
        fabric.narrow(fabric.hosts[0], 100.0)
        fabric.widen(fabric.hosts[0])
    except (OSError, subprocess.CalledProcessError) as exc:
        return f"tc and tbf are needed: {getattr(exc, 'stderr', exc)}".strip()
    return ""


def why_not_slow() -> str:
    """Why there can be no slow link here; '' when there can."""
    return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "/dev/net/tun is needed"


def enter(namespace: str) -> None:
    """Move the calling thread, and what it opens from now on, into a namespace. Raises OSError."""
    if not namespace:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with (NETNS / namespace).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), namespace)


@dataclass(slots=True)
class Host:
    """A machine of the fabric; `namespace` is '' where there are none: all hosts are loopback then."""

    index: int
    namespace: str
    address: str
    ports: Iterator[int]
    doorway: ThreadPoolExecutor = field(init=False)  # one thread that lives in the host
    link: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        """Its thread enters on first use."""
        self.doorway = ThreadPoolExecutor(1, initializer=enter, initargs=(self.namespace,))

    @property
    def inside(self) -> tuple[str, ...]:
        """What starts a command in it."""
        return ("ip", "netns", "exec", self.namespace) if self.namespace else ()

    def call(self, what: Callable[[], T]) -> T:
        """Do something from inside the host, and wait for it."""
        return self.doorway.submit(what).result()


class Fabric:
    """Hosts and their router. Use as a context manager."""

    def __init__(self, count: int) -> None:
        """Raises OSError, CalledProcessError; what was made until then is deleted."""
        self._router = f"router{os.getpid()}"
        self._cuts: set[tuple[int, int]] = set()
        self.hosts: list[Host] = []
        try:
            self._make(count)
        except BaseException:
            self.close()
            raise

    def _make(self, count: int) -> None:
        run("ip", "netns", "add", self._router)
        run("ip", "-n", self._router, "link", "set", "lo", "up")
        run("ip", "netns", "exec", self._router, sys.executable, "-c", FORWARD)
        for index in range(1, count + 1):
            name, ours, theirs = f"host{os.getpid()}x{index}", f"{NET}.{index}.1", f"{NET}.{index}.2"
            run("ip", "netns", "add", name)
            self.hosts.append(Host(index, name, theirs, itertools.count(4001)))
            run(*f"ip link add c{index} netns {self._router} type veth peer name eth0 netns {name}".split())
            run(*f"ip -n {self._router} addr add {ours}/24 dev c{index}".split())
            run(*f"ip -n {self._router} link set c{index} up".split())
            run(*f"ip -n {name} addr add {theirs}/24 dev eth0".split())
            for device in ("lo", "eth0"):
                run(*f"ip -n {name} link set {device} up".split())
            run(*f"ip -n {name} route add default via {ours} metric 100".split())

    def cut(self, ones: Iterable[Host], others: Iterable[Host], *, one_way: bool = False) -> None:
        """From now on packets of `ones` to `others` vanish, and the other way unless one_way."""
        for one, other in itertools.product(ones, others):
            for pair in (
                ((one.index, other.index),) if one_way else ((one.index, other.index), (other.index, one.index))
            ):
                self._rule("add", pair)
                self._cuts.add(pair)

    def heal(self) -> None:
        """No cut is left."""
        while self._cuts:
            self._rule("del", self._cuts.pop())

    def _rule(self, what: str, pair: tuple[int, int]) -> None:
        words = f"ip -n {self._router} rule {what} blackhole from {NET}.{pair[0]}.0/24 to {NET}.{pair[1]}.0/24"
        run(*words.split())

    def narrow(self, host: Host, mbit_per_s: float) -> None:
        """At most so many bits a second to and from a host."""
        for namespace, device in ((self._router, f"c{host.index}"), (host.namespace, "eth0")):
            words = f"tc -n {namespace} qdisc replace dev {device} root tbf rate {mbit_per_s}mbit burst {BURST}"
            run(*words.split(), "latency", QUEUE)

    def widen(self, host: Host) -> None:
        """The cable is as wide as before."""
        for namespace, device in ((self._router, f"c{host.index}"), (host.namespace, "eth0")):
            run(*f"tc -n {namespace} qdisc del dev {device} root".split())

    def slow(self, host: Host, delay_ms: float, loss: float, seed: int) -> None:
        """All packets to and from a host take delay_ms longer, and `loss` of them are lost. Raises OSError."""
        words = [sys.executable, "-m", "bench.tun_link", self._router, host.namespace, f"slow{host.index}"]
        words += [str(delay_ms), str(loss), str(seed)]
        host.link = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert host.link.stdout is not None
        if host.link.stdout.readline().strip() != "ready":
            raise OSError("the slow link did not start")
        run(*f"ip -n {self._router} route add {host.address}/32 dev slow{host.index}".split())
        run(*f"ip -n {host.namespace} route add default dev slow{host.index} metric 10 src {host.address}".split())

    def quicken(self, host: Host) -> str:
        """The slow link ends, and its routes with it; what it counted."""
        assert host.link is not None
        told, _ = _ended(host.link)
        host.link = None
        return told.strip()

    def close(self) -> None:
        """Delete all that was made."""
        for host in self.hosts:
            if host.link is not None:
                _ended(host.link)
            host.doorway.shutdown()
        for name in [self._router, *(host.namespace for host in self.hosts)]:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def __enter__(self) -> Fabric:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


FORWARD = "open('/proc/sys/net/ipv4/ip_forward', 'w').write('1')"


def _ended(link: subprocess.Popen[str]) -> tuple[str, str]:
    link.terminate()
    try:
        return link.communicate(timeout=SAY_S_MAX)
    except subprocess.TimeoutExpired:
        link.kill()
        return link.communicate()
