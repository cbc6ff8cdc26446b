"""A model's files on disk: which there are, what the safetensors headers claim, and the revision of it all.

Rules: nothing is opened that could run code (pickle), nothing outside the directory is followed to, sizes are checked
before parsing, and no tensor is read here: whether a model is sane is known before memory is taken for it.
Source: safetensors format, github.com/huggingface/safetensors README.md; SECURITY.md F15, F16, M1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import BadModel, NotFound

CONFIG_BYTES_MAX = 1 << 20  # the largest real ones are some tens of KiB
INDEX_BYTES_MAX = 32 << 20
HEADER_BYTES_MAX = 32 << 20  # 100,000 tensors need 12 MiB
TOKENIZER_BYTES_MAX = 256 << 20  # Gemma's is 33 MiB
TENSORS_MAX = 200_000
FILES_MAX = 2_000
DIMENSIONS_MAX = 8
PLAIN_NAME = re.compile(r"[a-z0-9_]+|None")  # of an attention function in transformers; a hub's kernel has a slash
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
OTHER_FILES = ("config.json", "generation_config.json", "sentence_bert_config.json", "1_Pooling/config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A directory that may be loaded: shapes by tensor name, the parsed config.json, sizes in bytes."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    weight_files: tuple[Path, ...]
    weight_bytes: int

    @property
    def elements(self) -> int:
        """How many numbers the weight files hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def read_checkpoint(path: Path, *, inside: Path | None = None) -> Checkpoint:
    """Checks a model directory without reading a tensor. `inside`: the directory that links may point into.

    Raises NotFound (no such directory, no config.json), BadModel (all else).
    """
    if not path.is_dir():
        raise NotFound(f"{path} is not a directory with a model in it (config.json, *.safetensors, tokenizer files)")
    root = (inside or path).resolve()
    names = _names(path)
    if "config.json" not in names:
        raise NotFound(f"{path} has no config.json, so it holds no model that transformers can load")
    if (path / "adapter_config.json").exists():
        raise BadModel(f"{path} is an adapter (adapter_config.json), not a whole model; merge it into its base first")
    for name in names:
        _check_file(path / name, root)
    config = read_json(path / "config.json", CONFIG_BYTES_MAX)
    if not isinstance(config.get("model_type"), str):
        raise BadModel(f"{path / 'config.json'} names no model_type, so its architecture is unknown")
    _check_keys(path, config)
    if config.get("quantization_config") is not None:
        raise BadModel(f"{path} is a quantized checkpoint, which is not supported; use the original in safetensors")
    if not set(VOCABULARIES) & set(names):
        raise BadModel(f"{path} has no tokenizer (such as tokenizer.json); copy it from where the model came from")
    files = _weight_files(path, names)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in read_header(file).items():
            if name in shapes:
                raise BadModel(f"{file} holds tensor {name!r} which another file holds too")
            shapes[name] = shape
    weight_bytes = sum(file.stat().st_size for file in files)
    return Checkpoint(path=path, config=config, shapes=shapes, weight_files=files, weight_bytes=weight_bytes)


def revision_of(checkpoint: Checkpoint) -> str:
    """ "sha256-" and 12 hex digits over names and digests of weights, configuration and tokenizer files."""
    total = hashlib.sha256()
    others = [checkpoint.path / name for name in (*TOKENIZER_FILES, *OTHER_FILES)]
    for file in sorted({*checkpoint.weight_files, *(file for file in others if file.is_file())}):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
        total.update(file.relative_to(checkpoint.path).as_posix().encode() + b"\0" + digest)
    return f"sha256-{total.hexdigest()[:12]}"


def read_json(path: Path, bytes_max: int) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises BadModel."""
    size = path.stat().st_size
    if size > bytes_max:
        raise BadModel(f"{path} has {size:,} bytes; at most {bytes_max:,} are read")
    try:
        value = json.loads(path.read_bytes())
    except OSError as exc:
        raise BadModel(f"{path} cannot be read: {exc.strerror}; check its owner and permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise BadModel(f"{path} is not valid JSON ({exc}); fetch the model again") from exc
    if not isinstance(value, dict):
        raise BadModel(f"{path} holds a JSON {type(value).__name__}, not an object; fetch the model again")
    return value


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes by name from a safetensors file, checked to fill the file exactly. Raises BadModel."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES_MAX):
                raise BadModel(f"{path} is no safetensors file or is cut short ({size:,} bytes); fetch it again")
            raw = stream.read(length)
    except OSError as exc:
        raise BadModel(f"{path} cannot be read: {exc.strerror}; check its owner and permissions") from exc
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise BadModel(f"{path} has a corrupt safetensors header ({exc}); fetch it again") from exc
    if not isinstance(entries, dict) or len(entries) > TENSORS_MAX:
        raise BadModel(f"{path} has a safetensors header that is no map of at most {TENSORS_MAX:,} tensors")
    entries.pop("__metadata__", None)
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        shape, begin, end = _entry(path, name, entry)
        shapes[name] = shape
        spans.append((begin, end))
    _check_spans(path, spans, size - 8 - length)
    return shapes


def _entry(path: Path, name: str, entry: object) -> tuple[tuple[int, ...], int, int]:
    """The shape and byte range of one header entry, which must agree. Raises BadModel."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            dtype in ITEM_BYTES
            and len(shape) <= DIMENSIONS_MAX
            and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            and math.prod(shape) * ITEM_BYTES[dtype] == end - begin
        ):
            return tuple(shape), begin, end
    raise BadModel(f"{path}: the header entry of tensor {name[:100]!r} is not consistent; fetch the file again")


def _check_spans(path: Path, spans: list[tuple[int, int]], body_bytes: int) -> None:
    """Tensors must lie one after the other and fill the body. Raises BadModel."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise BadModel(f"{path}: tensors overlap or leave a gap at byte {at:,}; fetch the file again")
        at = end
    if at != body_bytes:
        raise BadModel(f"{path} holds {body_bytes:,} bytes of tensors, its header says {at:,}; fetch it again")


def _check_keys(path: Path, config: dict[str, Any]) -> None:
    """Keys by which a configuration would have other files read, or code fetched from the hub. Raises BadModel."""
    stack: list[Any] = [config]
    while stack:
        for key, value in stack.pop().items():
            code = key.endswith("_implementation") and not PLAIN_NAME.fullmatch(str(value))
            if key == "transformers_weights" or code:
                raise BadModel(
                    f"{path / 'config.json'} sets {key} to {str(value)[:100]!r}, which could load other files or run "
                    "code; remove that key if you trust the model"
                )
            stack.extend(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict))


def _names(path: Path) -> tuple[str, ...]:
    try:
        names = sorted(entry.name for entry in os.scandir(path) if not entry.name.startswith("."))
    except OSError as exc:
        raise BadModel(f"{path} cannot be listed: {exc.strerror}; check its owner and permissions") from exc
    if len(names) > FILES_MAX:
        raise BadModel(f"{path} holds {len(names):,} files; a model has at most {FILES_MAX:,}")
    relevant = {*TOKENIZER_FILES, *OTHER_FILES}
    suffixes = (".safetensors", ".safetensors.index.json", *PICKLES)
    return tuple(name for name in names if name in relevant or name.endswith(suffixes))


def _check_file(path: Path, root: Path) -> None:
    """A file must be readable, regular and inside `root` after links. Raises BadModel."""
    try:
        resolved = path.resolve(strict=True)
        mode = resolved.stat().st_mode
    except (OSError, RuntimeError) as exc:
        raise BadModel(f"{path} is a link to nothing or cannot be reached; fetch the model again") from exc
    if not resolved.is_relative_to(root):
        raise BadModel(f"{path} is a link that leads out of {root}, to {resolved}; copy the file itself there")
    if not stat.S_ISREG(mode):
        raise BadModel(f"{path} is not a regular file")
    if not os.access(resolved, os.R_OK):
        raise BadModel(f"{path} cannot be read by this user; check its owner and permissions")
    if path.name in TOKENIZER_FILES and resolved.stat().st_size > TOKENIZER_BYTES_MAX:
        raise BadModel(f"{path} has over {TOKENIZER_BYTES_MAX:,} bytes, more than any tokenizer file")


def _weight_files(path: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    """The files that transformers will read the weights from. Raises BadModel."""
    if "model.safetensors" in names:
        return (path / "model.safetensors",)
    if "model.safetensors.index.json" in names:
        weight_map = read_json(path / "model.safetensors.index.json", INDEX_BYTES_MAX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadModel(f"{path / 'model.safetensors.index.json'} has no weight_map; fetch the model again")
        shards = sorted({str(name) for name in weight_map.values()})
        for shard in shards:
            if shard not in names or not shard.endswith(".safetensors"):
                raise BadModel(f"{path} lacks the weight file {shard[:200]!r} that its index names; fetch it again")
        return tuple(path / shard for shard in shards)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise BadModel(
            f"{path} has only pickle weights ({pickles[0]}), which can run code and are never opened here; "
            "get the model in safetensors"
        )
    raise BadModel(f"{path} has no model.safetensors (nor an index of shards); fetch the model again")
