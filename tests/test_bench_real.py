"""The benches of real processes: what they call an end, a silence and a slope."""

from __future__ import annotations

import httpx
import pytest

from bench.real_clients import ERROR, LEFT, REFUSED, RESULT, UNRESOLVED, Request, differing, judged
from bench.real_swarm import silence_s
from bench.soak import theil_sen

PIECE = 'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
END = 'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\n'
DONE = "data: [DONE]\n\n"
FAILED = 'event: error\ndata: {"error": {"message": "m", "type": "t", "code": "c"}}\n\n'


def request(**changes: object) -> Request:
    fields: dict[str, object] = {"door": "d", "streamed": True, "prompt": 0, "tokens": 4, "began": 1e12}
    return Request(**{**fields, **changes})  # type: ignore[arg-type]  # a test's own fields


@pytest.mark.parametrize(
    ("status", "content", "ended"),
    [
        (200, PIECE + END + USAGE + DONE, RESULT),
        (200, PIECE + FAILED + DONE, ERROR),
        (200, PIECE + END + USAGE, UNRESOLVED),  # cut at the very end
        (200, PIECE, UNRESOLVED),
        (200, PIECE + DONE, UNRESOLVED),  # no finish reason
        (200, PIECE + END + USAGE.replace("4", "3") + DONE, UNRESOLVED),  # a token is missing
        (200, 'data: {"error": {"message": "m"}}\n\n' + DONE, UNRESOLVED),
        (503, '{"error": {"message": "m", "type": "t", "code": null}}', REFUSED),
        (503, '{"detail": "m"}', UNRESOLVED),
    ],
)
def test_the_ends_of_a_stream_are_told_apart(status: int, content: str, ended: str) -> None:
    assert judged(httpx.Response(status, content=content), request(), 0)[0] == ended


@pytest.mark.parametrize(("made", "ended"), [(4, RESULT), (3, UNRESOLVED)])
def test_a_whole_answer_has_all_its_tokens(made: int, ended: str) -> None:
    content = f'{{"choices": [{{"text": "a", "finish_reason": "length"}}], "usage": {{"completion_tokens": {made}}}}}'
    assert judged(httpx.Response(200, content=content), request(streamed=False), 0)[0] == ended


def test_a_client_that_leaves_has_left() -> None:
    assert judged(httpx.Response(200, content=PIECE * 4), request(), 2)[0] == LEFT


def test_texts_that_differ_are_found() -> None:
    texts = [("abcd", 4), ("abc", 3), ("abX", 3)]
    found = differing([request(end=RESULT, text=text, tokens=tokens) for text, tokens in texts])
    assert [one.text for one in found] == ["abX"]


def test_the_silence_after_a_kill_is_measured_to_its_end() -> None:
    steady = [number / 10 for number in range(10)]
    assert silence_s([*steady, 2.4, 2.5], 0.95) == pytest.approx(1.45)
    assert silence_s([*steady, 1.1, 2.6, 2.7], 0.95) == pytest.approx(1.65)  # what was under way came still
    assert silence_s(steady, 0.89) is None  # it was whole


def test_a_slope_is_not_moved_by_one_odd_sample() -> None:
    points = [(float(hour), 100.0 + 2.0 * hour) for hour in range(11)]
    points[5] = (5.0, 1000.0)
    assert theil_sen(points) == pytest.approx(2.0)
    assert theil_sen([(0.0, 1.0)]) == 0.0
