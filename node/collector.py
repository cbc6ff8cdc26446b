"""When Python's collector of cycles looks: not while modules are imported, and never again at what they made.

Rules: imports make hundreds of thousands of objects that stay, and the collector goes through them again and again: a
fifth of the CPU of a start, and with torch a fifth of a second of the loop now and then for as long as the node runs.
Source: the gc module's `freeze`; measured by bench.idle.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Nothing is collected in the block; what is there at its end is not looked at any more. For imports only."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
