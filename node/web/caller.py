"""Who asks over HTTP: the account, what it may do, and how much; and what each path wants of who asks it.

Rules: core. A path that is not named here wants ADMIN, so that a new route is closed until somebody opens it. What may
be seen without a key tells nothing of this node but that it runs: health, and pages without content.
Source: SECURITY.md section 5; INTERFACES.md, "HTTP".
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum

from node.api_keys import ApiKey, KeyScope
from node.requester import LOCAL, STRANGER_PREFIX, account_of

PUBLIC_PATHS = frozenset({"/", "/chat", "/healthz", "/readyz", "/favicon.ico", "/openapi.json", "/robots.txt"})
PUBLIC_PREFIX = "/static/"
SESSION_PREFIX = "/api/v1/session"
MEMORY_PREFIX = "/api/v1/memory"  # what a node remembers is its operator's, to read as well
# the clients' own APIs: OpenAI's and Anthropic's, this node's, Ollama's
INFER_PREFIXES = ("/v1/", "/api/v1/model/")
INFER_PATHS = frozenset({"/api/v1/sealed"}) | frozenset(
    f"/api/{name}" for name in ("chat", "generate", "embed", "embeddings", "tags", "show", "ps", "version")
)


class Need(Enum):
    """What a route wants of who asks it."""

    NOTHING = "nothing"
    SESSION = "session"  # no key, but strangers' limits: it is how a wallet gets in
    INFER = "infer"
    TRAIN = "train"
    METRICS = "metrics"
    ADMIN = "admin"


def need_of(method: str, path: str) -> Need:
    """What this request wants."""
    reads = method in ("GET", "HEAD")
    if path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIX):
        return Need.NOTHING
    if path == SESSION_PREFIX or path.startswith(f"{SESSION_PREFIX}/"):
        return Need.SESSION
    if path.startswith(INFER_PREFIXES) or path in INFER_PATHS or path.endswith("/sealing-key"):
        return Need.INFER
    if path == MEMORY_PREFIX or path.startswith(f"{MEMORY_PREFIX}/"):
        return Need.ADMIN
    if path == "/metrics" or (reads and path.startswith("/api/v1/")):
        return Need.METRICS
    if path.startswith("/api/v1/training/"):
        return Need.TRAIN
    return Need.ADMIN


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second, and so many at once after a rest."""

    per_s: float
    burst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one account may take. tokens: prompt and answer together; None: no limit."""

    requests: Rate
    tokens: Rate | None
    concurrent: int  # requests for answers under way


# SECURITY.md section 5: without a name 1/s and 5 at once, with one 5/s and 20 at once, of which 2 under way
STRANGER_TOKENS = Rate(500.0, 30_000.0)  # 30,000 a minute: what a small CPU makes for one
ANONYMOUS = Limits(requests=Rate(1.0, 5.0), tokens=STRANGER_TOKENS, concurrent=2)
STRANGER = Limits(requests=Rate(5.0, 20.0), tokens=STRANGER_TOKENS, concurrent=2)
KNOWN = Limits(requests=Rate(5.0, 20.0), tokens=None, concurrent=2)  # a wallet that the operator listed
LOOKING = Rate(5.0, 20.0)  # requests of one address that only look, without a key
# an identity costs nothing, so those of one address share what two of them have, and those of a subnet four times that
ADDRESS_SIGNED = Rate(10.0, 40.0)
SUBNET_SIGNED = Rate(40.0, 160.0)
SUBNET_TIMES = 4.0  # of what one address has
SHARED = Limits(
    requests=ADDRESS_SIGNED, tokens=Rate(2 * STRANGER_TOKENS.per_s, 2 * STRANGER_TOKENS.burst), concurrent=4
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks. limits: None for none. is_named: it showed a key or signature that holds. shared: the account whose
    limits all have together that nobody vouched for and that ask from its address."""

    account: str
    limits: Limits | None
    scopes: frozenset[KeyScope]
    is_named: bool = False
    shared: str | None = None

    def all_limits(self) -> dict[str, Limits]:
        """By account, its own and those that it shares."""
        own = {} if self.limits is None else {self.account: self.limits}
        return own if self.shared is None else {**own, self.shared: SHARED}

    def may(self, need: Need) -> bool:
        """Whether it has the right."""
        if need in (Need.NOTHING, Need.SESSION) or KeyScope.ADMIN in self.scopes:
            return True
        return need is not Need.ADMIN and KeyScope(need.value) in self.scopes


ALL = frozenset({KeyScope.ADMIN})
OPERATOR = Caller(account=LOCAL, limits=None, scopes=ALL)  # at this machine, without a key


def of_key(key: ApiKey) -> Caller:
    """The owner of an API key."""
    tokens = None if key.tokens_per_min is None else Rate(key.tokens_per_min / 60, float(key.tokens_per_min))
    requests = Rate(key.requests_per_s, key.burst)
    limits = Limits(requests=requests, tokens=tokens, concurrent=key.concurrent)
    return Caller(account=f"key:{key.id}", limits=limits, scopes=frozenset(key.scopes), is_named=True)


def of_signer(public_key: str) -> Caller:
    """Who holds a key that nobody vouches for."""
    return Caller(
        account=f"{STRANGER_PREFIX}ed25519:{public_key}",
        limits=STRANGER,
        scopes=frozenset({KeyScope.INFER}),
        is_named=True,
    )


def of_wallet(address: str, *, is_listed: bool) -> Caller:
    """Who asks by a session key that a wallet has authorised; all of a wallet's keys are one account."""
    name = f"wallet:{address}"
    return Caller(
        account=name if is_listed else f"{STRANGER_PREFIX}{name}",
        limits=KNOWN if is_listed else STRANGER,
        scopes=frozenset({KeyScope.INFER}),
        is_named=True,
    )


def of_address(host: str | None) -> Caller:
    """Who shows nothing: the operator on this machine, elsewhere whoever has that address."""
    account = account_of(host)
    return OPERATOR if account == LOCAL else Caller(account=account, limits=ANONYMOUS, scopes=ALL)


def subnet_of(host: str | None) -> str | None:
    """The /24, of IPv6 the /56, that a public address is in; None for one that is not public, or is none."""
    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if not address.is_global:  # as p2p/address.py: a LAN is not one person
        return None
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 56), strict=False))
