"""Whether who asks sits at this machine: what reads its files or its memory is for nobody else without a key.

Rules: a named key of the right scope comes from anywhere. Without one only loopback counts, and what says that a proxy
handed it on does not: a proxy on this machine comes from loopback too, whoever stands behind it. That --open lets
anybody ask is no leave for this. Whoever is refused is counted.
Source: SECURITY.md section 5.
"""

from __future__ import annotations

import ipaddress

from starlette.requests import Request

from node.web.asker import proxy_header
from node.web.caller import Caller, Need
from node.web.door import CALLER_KEY, COUNTS_KEY, headers_of
from node.web.errors import Forbidden


def check_is_operator(request: Request, need: Need, counted: str, what: str) -> None:
    """Raises Forbidden. counted: what refusals are counted as; what: sentence begun, as "training is begun"."""
    caller: Caller | None = request.scope.get(CALLER_KEY)
    if caller is not None and caller.is_named and caller.may(need):
        return
    host = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        address = ipaddress.ip_address("0.0.0.0")  # nobody's
    mapped = getattr(address, "ipv4_mapped", None)  # as a socket for both families has it
    drops = request.scope[COUNTS_KEY].drops
    if not (mapped or address).is_loopback:
        drops[f"{counted}_from_elsewhere"] += 1
        raise Forbidden(f"{what} from this machine only: ask on 127.0.0.1")
    name = proxy_header(headers_of(request.scope))
    if name is not None:
        drops[f"{counted}_by_proxy"] += 1
        raise Forbidden(
            f"{what} from this machine only, and the header {name[:40]} says that a proxy "
            "hands this on: ask the node itself, on 127.0.0.1",
            param=name[:40],
        )
