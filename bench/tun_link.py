"""`python -m bench.tun_link NEAR FAR NAME DELAY_MS LOSS SEED`: a slow, lossy link between two namespaces.

Rules: a TUN device called NAME in each namespace; what enters one leaves the other after DELAY_MS, in order, or is lost
with probability LOSS. At most QUEUED_MAX packets wait; more are lost. Says `ready` when the devices are up, and counts
when it is told to end (SIGTERM). The devices, and the routes through them, end with the process.
Source: Linux Documentation/networking/tuntap.rst. `tc netem` would do it, where the kernel has it.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque

from bench.real_net import enter

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET_BYTES_MAX = 65_535
QUEUED_MAX = 20_000  # of each direction: 30 MB


def tun(namespace: str, name: str) -> int:
    """A TUN device in a namespace, up; its descriptor. Raises OSError."""
    made: list[int] = []

    def make() -> None:
        enter(namespace)
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
        subprocess.run(["ip", "-n", namespace, "link", "set", name, "up"], check=True)
        made.append(descriptor)

    thread = threading.Thread(target=make)  # only a thread changes its namespace, and ends with it
    thread.start()
    thread.join()
    if not made:
        raise OSError(f"no TUN device {name} in {namespace}")
    return made[0]


class Link:
    """Both directions; `run` returns when `stop` is called."""

    def __init__(self, ends: tuple[int, int], delay_s: float, loss: float, rng: random.Random) -> None:
        self._other = {ends[0]: ends[1], ends[1]: ends[0]}
        self._delay_s, self._loss, self._rng = delay_s, loss, rng
        self._waiting: deque[tuple[float, int, bytes]] = deque()  # in order of time, since the delay is one
        self._stopped = False
        self.passed = self.lost = self.overflowed = 0

    def stop(self, *_: object) -> None:
        """End soon."""
        self._stopped = True

    def run(self) -> None:
        """Pass packets on."""
        while not self._stopped:
            wait_s = 0.2 if not self._waiting else max(0.0, self._waiting[0][0] - time.monotonic())
            readable, _, _ = select.select(list(self._other), [], [], min(wait_s, 0.2))
            for end in readable:
                self._take(end)
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                self._give(self._waiting.popleft())

    def _take(self, end: int) -> None:
        for _ in range(64):  # then the other end has its turn
            try:
                packet = os.read(end, PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            if len(self._waiting) >= 2 * QUEUED_MAX:
                self.overflowed += 1
            elif self._rng.random() < self._loss:
                self.lost += 1
            else:
                self._waiting.append((time.monotonic() + self._delay_s, self._other[end], packet))

    def _give(self, item: tuple[float, int, bytes]) -> None:
        try:
            os.write(item[1], item[2])
            self.passed += 1
        except OSError:  # the device's own queue is full
            self.overflowed += 1


def main() -> None:
    """Run until SIGTERM."""
    near, far, name, delay_ms, loss, seed = sys.argv[1:]
    link = Link((tun(near, name), tun(far, name)), float(delay_ms) / 1000, float(loss), random.Random(int(seed)))
    signal.signal(signal.SIGTERM, link.stop)
    print("ready", flush=True)
    link.run()
    print(json.dumps({"passed": link.passed, "lost": link.lost, "overflowed": link.overflowed}), flush=True)


if __name__ == "__main__":
    main()
