"""What `doctor` checks on this machine: settings, key, files, ports, clock, disk, multicast.

Rules: a check never raises and never changes what it looks at (the lock is taken and given back). Each says what was
found and, when it needs attention, what to do. Nothing is sent to any machine but that of a --backend.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from node.commands.keys import identity_path

if TYPE_CHECKING:
    from node.config import NodeConfig

DISK_BYTES_MIN = 200 << 20  # identity, address book and log; below this even a checkpoint of state may fail
DISK_BYTES_LOW = 2 << 30  # one small model from the hub
BUILT_S = 1_760_000_000  # October 2025: no clock that is right can say less
CLOCK_S_MAX = 4_102_444_800  # the year 2100
FUTURE_S_MAX = 300.0  # a file of ours from further in the future means that the clock went back
MULTICAST = "224.0.0.251"  # mDNS


class Verdict(Enum):
    """How a check came out."""

    OK = "ok"
    LOOK = "look"  # works, but not as it should
    BAD = "bad"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor's table."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name=name, verdict=Verdict.OK, found=found)


def look(name: str, found: str, advice: str) -> Check:
    return Check(name=name, verdict=Verdict.LOOK, found=found, advice=advice)


def bad(name: str, found: str, advice: str) -> Check:
    return Check(name=name, verdict=Verdict.BAD, found=found, advice=advice)


def local_checks(config: NodeConfig, *, now_s: float) -> Iterator[Check]:
    """All checks that need no running node, in the order in which a start would meet them."""
    directory = check_data_dir(config.data_dir)
    running = directory.found.startswith("in use")
    yield directory
    yield check_key(identity_path(config))
    yield check_disk(config.data_dir)
    yield check_clock(config.data_dir, now_s)
    yield check_bootstrap(config.bootstrap_path())
    if config.upstream_url() is not None:
        yield from check_backend(config)
    else:
        for name, model in (("model", config.model), ("embedding model", config.embedding_model)):
            if model is not None:
                yield check_model(name, model)
    yield from check_ports(config, running=running)
    if config.mdns:
        yield check_multicast()


def check_data_dir(folder: Path) -> Check:
    """Whether a node can use the data directory, or one does. `found` starts with "in use" when one does."""
    from node.errors import ConfigError, DataDirLocked
    from node.start import locked

    name = "data directory"
    if not folder.exists():
        parent = next((above for above in folder.parents if above.exists()), Path("/"))
        return ok(name, f"{folder} is not there yet; the first start makes it under {parent}")
    if not folder.is_dir():
        return bad(name, f"{folder} is not a directory", "move it away, or choose another with --data-dir")
    if not (folder / "lock").exists():
        return ok(name, f"{folder}, no node has used it yet")
    try:
        with locked(folder):
            return ok(name, f"{folder}, no node runs on it")
    except DataDirLocked:
        return ok(name, f"in use by a running node: {folder}")
    except ConfigError as exc:
        return bad(name, str(exc), f"make {folder} writable for this user, or choose another with --data-dir")


def check_key(path: Path) -> Check:
    """Whether the identity key is there, whole and ours alone."""
    from crypto.errors import BadKey, UnsafePermissions
    from crypto.identity import Identity

    name = "identity key"
    if not path.exists() and not path.is_symlink():
        return ok(name, "none yet; the first start makes one")
    try:
        return ok(name, f"{Identity.load(path).peer_id}, readable by its owner alone")
    except UnsafePermissions as exc:
        return bad(name, str(exc), f"if nobody else has read it: chmod 600 {path}; else `keys identity rotate`")
    except BadKey as exc:
        return bad(name, str(exc), "restore it from a copy, or move it away to get a new identity")


def check_disk(folder: Path) -> Check:
    """Room where the data directory is."""
    place = next(there for there in (folder, *folder.absolute().parents) if there.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / (1 << 30):.1f} GiB free at {place}"
    if free < DISK_BYTES_MIN:
        return bad("disk", found, "make room: the node cannot keep its state")
    if free < DISK_BYTES_LOW:
        return look("disk", found, "room for the node, hardly for another model or a checkpoint")
    return ok("disk", found)


def check_clock(folder: Path, now_s: float) -> Check:
    """Whether the wall clock can be right: adverts and signatures carry its time."""
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(max(now_s, 0.0), CLOCK_S_MAX)))
    advice = "set the clock (NTP): peers refuse what is signed over a minute off"
    if not BUILT_S <= now_s <= CLOCK_S_MAX:
        return bad("clock", f"{told} cannot be right", advice)
    newest_s = max((file.stat().st_mtime for file in folder.glob("*") if file.is_file()), default=0.0)
    if newest_s > now_s + FUTURE_S_MAX:
        return bad("clock", f"{told}, but files of the node are {(newest_s - now_s) / 60:.0f} min newer", advice)
    return ok("clock", told)


def check_bootstrap(path: Path | None) -> Check:
    """Whether the bootstrap file can be read."""
    from p2p.bootstrap import read_bootstrap_file
    from p2p.errors import P2PError

    if path is None:
        return ok("bootstrap file", "none")
    try:
        count = len(read_bootstrap_file(path))
    except P2PError as exc:
        return bad("bootstrap file", str(exc), f"mend {path}")
    return ok("bootstrap file", f"{path}: {count} peers")


def check_model(name: str, model: str) -> Check:
    """Whether a model's files are whole, by their headers; no tensor is read and torch stays out."""
    from model.checkpoint import read_checkpoint
    from model.errors import ModelError

    if model == "none":
        return ok(name, "none: this node serves by its peers only")
    path = Path(__file__).parents[2] / "model" / "default" if model == "default" else Path(model).expanduser()
    if model != "default" and not path.is_dir():
        if model == "all-MiniLM-L6-v2" or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
            return ok(
                name, f"{model}: no directory, so a name; the start finds it in its cache or package, or fetches it"
            )
        return bad(
            name, f"{model} is no directory", "give a directory with safetensors, a hub name (owner/name), or none"
        )
    try:
        checkpoint = read_checkpoint(path)
    except ModelError as exc:
        return bad(name, str(exc), "fetch the model again, or choose another with --model")
    size = checkpoint.weight_bytes / (1 << 20)
    return ok(name, f"{path}: {checkpoint.elements:,} parameters, {size:.1f} MiB, headers whole")


def check_backend(config: NodeConfig) -> Iterator[Check]:
    """Whether the server behind the node answers, takes the key and has the model; it is asked for its list only."""
    import trio

    from node.errors import ConfigError
    from node.upstream_start import glance_at

    name, url = "backend", config.upstream_url()
    try:
        found = trio.run(glance_at, config)
        yield ok(
            name, f"{found.dialect.name} at {url} has {found.id}, {found.facts.context_tokens:,} tokens of context"
        )
    except ConfigError as exc:
        yield bad(name, str(exc), "start that server, or mend --backend, --model or --backend-key-file")
    host = urlsplit(str(url))
    if host.scheme == "http" and not _is_here(host.hostname or ""):
        yield look(
            "backend's wire", f"{url} is another machine, without TLS", "prompts and the key can be read: use https"
        )
    key = config.backend_key_file
    if key is not None and os.name == "posix" and key.exists() and key.stat().st_mode & 0o077:
        yield look("backend's key", f"others on this machine can read {key}", f"chmod 600 {key}")


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_ports(config: NodeConfig, *, running: bool) -> Iterator[Check]:
    """Whether the fixed ports are free; under a running node they are its own."""
    fixed: list[tuple[str, str, int]] = []
    http = config.http_address()
    if http is not None and http.port:
        fixed.append(("HTTP port", http.host, http.port))
    for address in config.listen:
        found = re.match(r"/ip[46]/([^/]+)/tcp/(\d+)", address)
        if found and int(found[2]):
            fixed.append(("listen port", found[1], int(found[2])))
    for name, host, port in fixed:
        if running:
            yield ok(name, f"{host}:{port}, left to the running node")
        else:
            yield check_port(name, host, port)


def check_port(name: str, host: str, port: int) -> Check:
    """Whether a TCP port can be bound."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        flag = "--http" if name == "HTTP port" else "--listen"
        return bad(name, f"{host}:{port}: {exc.strerror or exc}", f"stop what holds it, or choose another with {flag}")
    return ok(name, f"{host}:{port} is free")


def check_multicast() -> Check:
    """Whether this machine lets us join the mDNS group, by which peers on one network find each other."""
    group = socket.inet_aton(MULTICAST) + socket.inet_aton("0.0.0.0")
    try:
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    except OSError as exc:
        return look(
            "multicast",
            f"cannot join {MULTICAST}: {exc.strerror or exc}",
            "peers on this network are not found by themselves: use --bootstrap, or --no-mdns to silence this",
        )
    return ok("multicast", f"the mDNS group {MULTICAST} can be joined; whether the network passes it on was not tried")
