"""Which texts go through an encoder together, so that little is computed for padding.

Rules: core. Texts are put in the order of their length and cut into batches; each is padded to its longest. Of all ways
to cut, the cheapest: a pass costs PASS_TOKENS beside the tokens that go through it. A batch has at most tokens_max
tokens, padding among them, or is one text.
Source: measured on one core of an EPYC with MiniLM-L6, where a pass takes 10 ms and 0.31 ms a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PASS_TOKENS = 32


def batches(lengths: Sequence[int], tokens_max: int) -> list[list[int]]:
    """The places of the texts of these lengths, batch by batch, the shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    costs, begins = [0.0], [0]  # of the cheapest way to cut the first so many, and where its last batch begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best, best_begin = math.inf, end - 1
        for begin in range(end - 1, -1, -1):
            tokens = longest * (end - begin)
            if tokens > tokens_max and end - begin > 1:
                break
            if costs[begin] + tokens < best:
                best, best_begin = costs[begin] + tokens, begin
        costs.append(best + PASS_TOKENS)
        begins.append(best_begin)
    cut, end = list[list[int]](), len(order)
    while end:
        cut.append(order[begins[end] : end])
        end = begins[end]
    return cut[::-1]
