"""How far the loading of a model is, as transformers' own bar would show it.

Rules: the hook is transformers', and there is one in a process: who loads, loads one model at a time.
Source: transformers `utils/logging.py` (set_tqdm_hook), `core_model_loading.py` ("Loading weights").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers.utils import logging

OnProgress = Callable[[int, int], None]  # tensors loaded, and of how many
T = TypeVar("T")


@contextmanager
def watched(on_progress: OnProgress | None) -> Iterator[None]:
    """Call on_progress with what the bar would show; None: nothing is watched."""
    if on_progress is None:
        yield
        return

    def counting(items: Iterable[T], *args: Any, **options: Any) -> Iterator[T]:
        total = len(items) if isinstance(items, Sized) else 0
        for done, item in enumerate(items, 1):
            yield item
            on_progress(done, total)

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        is_of_weights = bool(args) and options.get("desc") == "Loading weights"
        return counting(*args) if is_of_weights else factory(*args, **options)

    before = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
