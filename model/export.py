"""What a run has learnt, written as a folder that loads like any model: safetensors, configuration, tokenizer files.

Rules: fp32, the numbers that the run's members agree on, whatever the model serves in. The base model must be the
run's, to the bit, and is changed in memory only. Tied tensors stand once in the flat vector and in the file; loading
ties them again. Files of the tokenizer are copied as they are. Sync, and takes seconds and memory.
Source: huggingface.co/docs/transformers, "save_pretrained"; huggingface.co/docs/peft, "PEFT checkpoint format".
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from crypto.digest import Digest
from model.adapters import AdapterConfig, add_adapters, merged, save_adapters, trainable
from model.checkpoint import TOKENIZER_FILES
from model.errors import FOREIGN, BadModel, BadState, CannotWrite, first_line
from model.layout import layout_of
from model.load import Loaded
from model.participant import FP32_BYTES, load_named

MEND = "they are damaged; start the node, which goes on from the newest that are whole"
SHARD = "4GB"  # of a file of weights: what any file system and any upload takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run's weights over its base model: loaded is in fp32 on the CPU, and nobody else's. model: with the adapters in
    it, if the run has some. named: the values of what was trained."""

    loaded: Loaded
    model: Any
    named: dict[str, torch.Tensor]
    has_adapters: bool


def trained(loaded: Loaded, state: bytes, layout: Digest, adapters: tuple[AdapterConfig, Digest] | None) -> Trained:
    """Read a state (model/participant.py) of this layout. adapters: of this kind, of the run of this id.

    Raises BadInput (peft is not installed), BadModel (the layout is another's), BadState.
    """
    model = loaded.model
    if adapters is not None:
        model = copy.deepcopy(model)
        add_adapters(model, *adapters)
    found = layout_of(dict(model.named_parameters()) if adapters is None else trainable(model))
    if found.digest != layout:
        raise BadModel(
            f"the run trains other tensors than the {found.size:,} numbers here; have the same releases of "
            "transformers and peft as the node that trained"
        )
    vector_bytes = FP32_BYTES * found.size
    if len(state) not in (vector_bytes, 2 * vector_bytes):  # the second half is the outer momentum
        raise BadState(f"the weights on disk have {len(state):,} bytes, wanted {vector_bytes:,}: {MEND}")
    theta_N = torch.frombuffer(bytearray(state[:vector_bytes]), dtype=torch.float32)
    if not theta_N.isfinite().all():
        raise BadState(f"the weights on disk have numbers that are not finite: {MEND}")
    return Trained(loaded=loaded, model=model, named=found.views(theta_N), has_adapters=adapters is not None)


def write_model(folder: Path, what: Trained) -> None:
    """The whole model, adapters merged in, into a folder that is there. Raises CannotWrite, BadModel."""
    model = what.loaded.model
    load_named(model, merged(what.model, what.named) if what.has_adapters else what.named)
    _written(folder, lambda: model.save_pretrained(str(folder), max_shard_size=SHARD))
    for name in TOKENIZER_FILES:
        source = what.loaded.found.path / name
        if source.is_file():
            _written(folder, lambda source=source, name=name: shutil.copyfile(source, folder / name))


def write_adapters(folder: Path, what: Trained, base: str) -> None:
    """The adapters alone, in peft's format, into a folder that is there. base: how the base model is called.

    Raises CannotWrite.
    """
    assert what.has_adapters
    _written(folder, lambda: save_adapters(folder, what.model, what.named, base))


def _written(folder: Path, write: Any) -> None:
    try:
        write()
    except OSError as exc:
        raise CannotWrite(f"{folder} takes no more: {exc.strerror or exc}; make room, or name another disk") from exc
    except SafetensorError as exc:
        raise CannotWrite(f"{folder} takes no more: {first_line(exc)}; make room, or name another disk") from exc
    except FOREIGN as exc:
        raise BadModel(f"the model cannot be written by transformers: {first_line(exc)}") from exc
