"""The second door: who asks, whether they may, and whether they may now; before a byte of the body is read.

Rules: shell; it stands between the door and the routes, and puts a Caller on the scope. An API key is looked up first,
so that a flood of others costs its owner nothing; a signature costs arithmetic, so its address pays before it is
checked. Whoever is refused gets one sentence, a code, and is counted. Without --api-keys whoever sits at this machine
may do all, and what clients send because they must send something is no key. Keys are in no log and no error.
Source: SECURITY.md section 5, C1, C3.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crypto.wallet import WalletAddress
from node.api_key_file import KeyFile
from node.api_keys import KeyRefused, Keyring, is_ours
from node.errors import BadRequest, RequestError
from node.requester import STRANGER_PREFIX, account_of
from node.web.answers import ClientGone
from node.web.caller import (
    ADDRESS_SIGNED,
    ANONYMOUS,
    LOOKING,
    SUBNET_SIGNED,
    SUBNET_TIMES,
    Caller,
    Need,
    Rate,
    need_of,
    of_address,
    of_key,
    of_signer,
    subnet_of,
)
from node.web.door import CALLER_KEY, COUNTS_KEY, headers_of, read_body, refuse
from node.web.errors import Forbidden, Limited, Unauthorized
from node.web.meter import Meter
from node.web.signed import Nonces, SignatureRefused, Signed, Target, check, check_body, is_signed
from node.web.wallets import SignIns

HOW = "send `authorization: Bearer KEY` (`python -m node keys create` makes one), or sign the request"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """required: every route but the public ones wants a key or a signature. strangers: signatures of keys that nobody
    vouched for are taken. audience: this node's peer id. wallets: that may sign in; empty: any, as strangers."""

    keys: KeyFile | None = None
    required: bool = False
    strangers: bool = True
    audience: str = ""
    wallets: frozenset[WalletAddress] = frozenset()


class Gate:
    """See the module."""

    def __init__(
        self,
        app: ASGIApp,
        config: GateConfig,
        meter: Meter,
        sign_ins: SignIns,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._app = app
        self._config = config
        self._meter = meter
        self._sign_ins = sign_ins
        self._clock = clock
        self._nonces = Nonces()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        need = need_of(scope["method"], scope["path"])
        if need is Need.NOTHING:
            await self._app(scope, receive, send)
            return
        entered: Caller | None = None
        try:
            try:
                caller, signed = self._caller(scope, need)
                if need is Need.INFER and scope["method"] == "POST" and caller.limits is not None:
                    self._meter.enter(caller.account, caller.all_limits())
                    entered = caller
                if signed is not None:
                    receive = await _checked(signed, scope, receive)
            except RequestError as error:
                _count(scope, error)
                await refuse(scope, send, error)
                return
            except ClientGone:
                return
            scope[CALLER_KEY] = caller
            await self._app(scope, receive, send)
        finally:
            if entered is not None:
                self._meter.leave(entered.account, entered.all_limits())

    def early(self, path: str, headers: dict[str, str]) -> Limited | None:
        """The refusal of a request with this head, when it is that of an API key that has taken what it may.

        None: it is not, or something else is wrong with it; nothing is taken. For serve.py, which is thereby rid of a
        flood before it costs a task.
        """
        text = _key_text(headers)
        if text is None or self._config.keys is None or "signature" in headers or not is_ours(text):
            return None
        if need_of("GET", path) is Need.NOTHING:
            return None
        now = trio.current_time()
        try:
            caller = of_key(self._config.keys.ring(now).check(text, self._clock()))
        except KeyRefused:
            return None
        assert caller.limits is not None
        return self._meter.refusal({("account", caller.account): caller.limits.requests}, now)

    def _caller(self, scope: Scope, need: Need) -> tuple[Caller, Signed | None]:
        """Who asks, when they may, and what their body must be. Raises RequestError."""
        client = scope.get("client")
        host = client[0] if client else None
        text = _key_text(headers_of(scope))
        has_key = text is not None and (self._config.required or is_ours(text))
        signed: Signed | None = None
        if is_signed(scope["headers"]):
            if has_key:
                raise BadRequest("the request has an API key and a signature: send one of the two", param="signature")
            caller, signed = self._by_signature(scope, host)
        elif has_key and text is not None:
            caller = self._by_key(text, host)
        else:
            caller = self._by_address(host, need, is_post=scope["method"] == "POST")
        if not caller.may(need):
            scopes = ", ".join(sorted(scope.value for scope in caller.scopes))
            raise Forbidden(f"this wants the scope {need.value}, and yours is {scopes}", code="lacks_scope")
        return caller, signed

    def _by_key(self, text: str, host: str | None) -> Caller:
        now = trio.current_time()
        ring = Keyring(()) if self._config.keys is None else self._config.keys.ring(now)
        try:
            caller = of_key(ring.check(text, self._clock()))
        except KeyRefused as exc:
            self._pay("address", host, LOOKING)
            raise Unauthorized(str(exc), code=exc.fault.value) from None
        assert caller.limits is not None
        self._meter.request({("account", caller.account): caller.limits.requests}, now)
        return caller

    def _by_signature(self, scope: Scope, host: str | None) -> tuple[Caller, Signed]:
        self._pay("signed", host, ADDRESS_SIGNED, SUBNET_SIGNED)
        now = self._clock()
        query = scope["query_string"].decode("latin-1")
        path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        target = Target(method=scope["method"], path=path, query=query)
        if (wait_s := self._nonces.wait_s(now)) > 0:
            message = f"this node remembers as many signed requests as it can: wait {wait_s:.0f} s"
            raise Limited(message, counter="limited_nonces", retry_after_s=wait_s)
        try:
            signed = check(target, scope["headers"], audience=self._config.audience, now=now)
            self._nonces.use(signed, now)
        except SignatureRefused as exc:
            raise Unauthorized(str(exc), code=exc.fault.value) from None
        caller = self._sign_ins.caller_of(signed.key, now)
        if caller is None:
            if not self._config.strangers:
                raise Unauthorized(
                    f"nobody here knows the key {signed.key[:16]}...: sign in with a listed wallet, "
                    "or ask for an API key",
                    code="unknown_signer",
                )
            caller = of_signer(signed.key)
        assert caller.limits is not None
        self._meter.request({("account", caller.account): caller.limits.requests}, trio.current_time())
        if caller.account.startswith(STRANGER_PREFIX):  # it costs nothing to be another
            caller = replace(caller, shared=f"shared:{account_of(host)}")
        return caller, signed

    def _by_address(self, host: str | None, need: Need, *, is_post: bool) -> Caller:
        caller = of_address(host)
        if need is not Need.SESSION and self._config.required:
            raise Unauthorized(f"this node wants an API key: {HOW}", code="missing_key")
        if caller.limits is None and not self._config.required:
            return caller
        costly = need is Need.SESSION or (need is Need.INFER and is_post)
        self._pay("asks" if costly else "looks", host, ANONYMOUS.requests if costly else LOOKING)
        return caller

    def _pay(self, what: str, host: str | None, rate: Rate, subnet_rate: Rate | None = None) -> None:
        """One request of an address, and of its subnet. Raises Limited."""
        taken = {(what, account_of(host)): rate}
        subnet = subnet_of(host)
        if subnet is not None:
            shared = subnet_rate or Rate(rate.per_s * SUBNET_TIMES, rate.burst * SUBNET_TIMES)
            taken["subnet", subnet] = shared
        self._meter.request(taken, trio.current_time())


async def _checked(signed: Signed, scope: Scope, receive: Receive) -> Receive:
    """The body, read and found to be the one that was signed, to be received again."""
    body = await read_body(scope, receive)
    try:
        check_body(signed, body)
    except SignatureRefused as exc:
        raise Unauthorized(str(exc), code=exc.fault.value) from None
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _key_text(headers: dict[str, str]) -> str | None:
    """What a client sends as its key: OpenAI's clients one way, Anthropic's another."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and text.strip():
        return text.strip()
    return headers.get("x-api-key") or None


def _count(scope: Scope, error: RequestError) -> None:
    """Count a refusal; those of the body are counted where it is read."""
    if isinstance(error, Limited):
        scope[COUNTS_KEY].drops[error.counter] += 1
    elif isinstance(error, Unauthorized | Forbidden | BadRequest):
        scope[COUNTS_KEY].drops[error.code] += 1
