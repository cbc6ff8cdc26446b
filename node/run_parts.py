"""What node/run.py does between its tasks: load the runtime, keep the ready file.

Rules: shell; no task of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from crypto.disk import write_whole
from node.collector import importing
from node.config import NodeConfig
from node.errors import ConfigError

if TYPE_CHECKING:
    from model.runtime_face import Runtime


def load_runtime(config: NodeConfig, *, on_progress: Callable[[int, int], None]) -> Runtime:
    """Import torch and load the model; in a worker thread. Raises ModelError."""
    with importing():
        from model.config import RuntimeConfig
        from model.runtime import Runtime

    return Runtime.load(
        config.model,
        RuntimeConfig(
            device=config.device,
            dtype=config.dtype,
            quantize=config.quantize,
            threads=config.threads,
            embedding_name=config.embedding_model or "",
            slots=config.max_batch,
            kv_cache_mb=config.kv_cache_mb,
            model_type=config.model_type,
            max_length=config.max_length or 0,
        ),
        on_progress,
    )


@contextmanager
def announced(path: Path | None, ready: dict[str, object]) -> Iterator[None]:
    """The ready file, whole or absent, there for as long as the block runs. Raises ConfigError."""
    if path is None:
        yield
        return
    try:
        write_whole(path, json.dumps(ready).encode() + b"\n", over=True, mode=0o644)
    except OSError as exc:
        raise ConfigError(f"cannot write the ready file {path}: {exc.strerror}") from exc
    try:
        yield
    finally:
        with suppress(OSError):  # a disk that is read-only by now keeps a file, and no more
            path.unlink(missing_ok=True)
