"""Networks of our own for tests: namespaces, cables, home routers with NAT, and what runs inside them.

Rules: every namespace made here is deleted when the block is left, however that comes about; its cables go with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from node.commands.processes import NodeProcess

# what a home router does: replies come back in, nobody else does, and nobody is told so
ROUTER = """
table ip nat {{
  chain out {{
    type nat hook postrouting priority 100
    oifname "{wan}" masquerade {ports}
  }}
}}
table inet door {{
  chain through {{
    type filter hook forward priority 0
    iifname "{wan}" ct state established,related accept
    iifname "{wan}" drop
  }}
  chain own {{
    type filter hook input priority 0
    iifname "{wan}" ct state established,related accept
    iifname "{wan}" meta l4proto tcp drop
  }}
}}
"""
GET = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read().decode())"
ASK = """
import sys, json, urllib.request as u
body = {"model": "default", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
ask = u.Request(sys.argv[1] + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
got = u.urlopen(ask, timeout=100)
print(json.dumps({"served_by": got.headers["x-served-by"], "text": json.load(got)["choices"][0]["text"]}))
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def inside(host: str) -> tuple[str, ...]:
    """The command that runs another one in a namespace."""
    return ("ip", "netns", "exec", host)


def run(host: str, *command: str, stdin: str = "") -> str:
    done = subprocess.run([*inside(host), *command], input=stdin, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{command} in {host}: {done.stderr[-2000:]}"
    return done.stdout


def told(host: str, node: NodeProcess, path: str = "/api/v1/status") -> Any:
    """What a node inside a namespace says of itself."""
    return json.loads(run(host, sys.executable, "-c", GET, node.url + path))


def asked(host: str, node: NodeProcess) -> dict[str, str]:
    """One completion asked at a node from inside its namespace: by whom it was served, and its text."""
    answer: dict[str, str] = json.loads(run(host, sys.executable, "-c", ASK, node.url))
    return answer


@dataclass
class Wide:
    """An internet of one cable, and the hosts on it."""

    prefix: str
    hosts: list[str] = field(default_factory=list)
    cables: int = 0

    def namespace(self, name: str) -> str:
        host = f"{self.prefix}{name}"
        ip("netns", "add", host)
        self.hosts.append(host)
        ip("-n", host, "link", "set", "lo", "up")
        return host

    def cable(self, one: str, other: str) -> tuple[str, str]:
        """Join two namespaces; gives the device's name in each."""
        self.cables += 1
        names = (f"a{self.cables}", f"b{self.cables}")
        ip("link", "add", names[0], "netns", one, "type", "veth", "peer", "name", names[1], "netns", other)
        for host, device in zip((one, other), names, strict=True):
            ip("-n", host, "link", "set", device, "up")
        return names

    def public(self, name: str, *addresses: str) -> str:
        """A host on the internet, at addresses with their prefix lengths."""
        host = self.namespace(name)
        here, there = self.cable(host, self.hosts[0])
        ip("-n", self.hosts[0], "link", "set", there, "master", "wire")
        for address in addresses:
            ip("-n", host, "addr", "add", address, "dev", here, *(["nodad"] if ":" in address else []))
        return host

    def home(self, name: str, wan: str, *, ports: str = "", lan: str = "192.168.1") -> str:
        """A host behind a router of its own that does NAT: LAN.2, seen from outside at `wan`.

        ports: "" keeps them where it can, as most home routers do; "random" shows another one to each destination.
        """
        router = self.public(f"{name}r", wan)
        device = f"a{self.cables}"
        host = self.namespace(name)
        here, there = self.cable(host, router)
        ip("-n", host, "addr", "add", f"{lan}.2/24", "dev", here)
        ip("-n", router, "addr", "add", f"{lan}.1/24", "dev", there)
        ip("-n", host, "route", "add", "default", "via", f"{lan}.1")
        run(router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        run(router, "nft", "-f", "-", stdin=ROUTER.format(wan=device, ports=ports))
        return host


@contextmanager
def wide() -> Iterator[Wide]:
    """An internet, or a skipped test where this machine has none to make."""
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            pytest.skip(f"the program {tool} is missing: this test makes networks of its own with it")
    net = Wide(f"w{os.getpid() % 100000}")
    try:
        try:
            wire = net.namespace("i")
            ip("-n", wire, "link", "add", "wire", "type", "bridge")
            ip("-n", wire, "link", "set", "wire", "up")
            run(wire, "nft", "list", "ruleset")
        except (OSError, subprocess.CalledProcessError, AssertionError) as exc:
            pytest.skip(f"network namespaces with nftables need root here: {exc}")
        yield net
    finally:
        for host in net.hosts:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)
