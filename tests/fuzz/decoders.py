"""Every decoder of bytes that this process did not just write itself, by name.

Rules: `read` of a target raises one of its `errors` for what it does not take, and nothing else; where a value has a
way back to bytes, it goes it and compares. Used by tests/test_fuzz_decoders.py (hypothesis, in the default suite) and
tests/fuzz/run.py (atheris).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.fuzz import model_targets, round_targets, sealed_targets, state_targets, text_targets, wire_targets
from tests.fuzz.target import Target

TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    **wire_targets.TARGETS,
    **state_targets.TARGETS,
    **text_targets.TARGETS,
    **model_targets.TARGETS,
    **round_targets.TARGETS,
    **sealed_targets.TARGETS,
}
