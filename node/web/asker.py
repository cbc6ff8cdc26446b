"""Who asks over HTTP, and what the headers say of how to answer: route, time, privacy.

Rules: core. Who showed a key or a signature is the account of that (node/web/gate.py); else clients on this machine
are one account, others one by their address. What a proxy hands on may be
anybody's, so nothing is kept for it: that one of its clients is answered at once would tell what another asked.
Source: RFC 7239 (Forwarded); RFC 9110 section 7.6.3 (Via); RFC 9111 section 5.2.1 (no-store, no-cache).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from starlette.types import Scope

from node.errors import BadRequest
from node.front import Route, RouteHint
from node.requester import account_of
from node.web.caller import Caller
from node.web.door import CALLER_KEY, headers_of
from node.web.schema_parts import shown

# what proxies add; of X-Forwarded-For, -Host, -Proto and their kin the beginning is enough
PROXY_HEADERS = frozenset({
    "forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "x-original-forwarded-for",
    "x-original-host", "x-envoy-external-address", "x-proxyuser-ip", "client-ip", "true-client-ip", "cf-connecting-ip",
    "cf-ray", "fastly-client-ip", "fly-client-ip", "proxy-connection", "tailscale-user-login",
})  # fmt: skip
PROXY_PREFIX = "x-forwarded"
SEALED_KEY = "openagi.sealed"  # in the scope of a request that was opened here: its RouteHint
DEADLINE_S_DEFAULT = 120.0
DEADLINE_S_MAX = 86_400.0
_PEER = re.compile(r"[1-9A-HJ-NP-Za-km-z]{8,128}")
UNCACHED = frozenset({"no-store", "no-cache"})
TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """hint: the route, and on whose account. private: nothing of the request is shared with others. keeps: its answer
    may be kept, and be one that was."""

    hint: RouteHint
    deadline_s: float
    private: bool
    keeps: bool


def asker_of(scope: Scope) -> Asker:
    """Of one request. Raises BadRequest, naming the header."""
    headers = headers_of(scope)
    private = private_of(headers)
    sealed: RouteHint | None = scope.get(SEALED_KEY)
    if sealed is not None:  # who sealed it is not known: nothing is kept, and nobody else answers
        return Asker(hint=sealed, deadline_s=deadline_s_of(headers), private=private, keeps=False)
    wants = {word.strip().lower() for word in headers.get("cache-control", "").split(",")}
    return Asker(
        hint=replace(route_of(headers), account=account_of_scope(scope)),
        deadline_s=deadline_s_of(headers),
        private=private,
        keeps=not (private or wants & UNCACHED or proxy_header(headers)),
    )


def account_of_scope(scope: Scope) -> str:
    """On whose account: the one that the gate found, else that of the address."""
    caller: Caller | None = scope.get(CALLER_KEY)
    client = scope.get("client")
    return caller.account if caller is not None else account_of(client[0] if client else None)


def private_of(headers: Mapping[str, str]) -> bool:
    """x-private: whether the request is to share nothing. Raises BadRequest."""
    text = headers.get("x-private", "false")
    if text.lower() not in TRUTH:
        raise BadRequest(f"x-private is {text[:60]!r}, wanted true or false", param="x-private")
    return TRUTH[text.lower()]


def proxy_header(headers: Mapping[str, str]) -> str | None:
    """The name of a header that says that somebody handed the request on."""
    return next((name for name in headers if name in PROXY_HEADERS or name.startswith(PROXY_PREFIX)), None)


def route_of(headers: Mapping[str, str]) -> RouteHint:
    """Where the client wants its answer from: x-route, x-peer. Raises BadRequest."""
    name, peer = headers.get("x-route", Route.AUTO.value), headers.get("x-peer")
    routes = {route.value: route for route in Route}
    if name not in routes:
        raise BadRequest(f"x-route is {shown(name)}, wanted one of {', '.join(routes)}", param="x-route")
    if peer is not None and not _PEER.fullmatch(peer):
        raise BadRequest(f"x-peer is {shown(peer)}, wanted a peer id like 12D3KooW...", param="x-peer")
    return RouteHint(route=routes[name], peer=peer)


def deadline_s_of(headers: Mapping[str, str]) -> float:
    """Seconds that the client gives the answer: x-timeout-s. Raises BadRequest."""
    text = headers.get("x-timeout-s")
    if text is None:
        return DEADLINE_S_DEFAULT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.001 <= seconds <= DEADLINE_S_MAX:
        raise BadRequest(f"x-timeout-s is {shown(text)}, wanted 0.001 to {DEADLINE_S_MAX:.0f}", param="x-timeout-s")
    return seconds
