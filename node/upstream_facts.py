"""What a server behind this node says of itself, read strictly: which kind it is, its models, and how busy it is.

Rules: core. Whatever it says, or does not, gives facts within the bounds of an advert, or Unfit in words for the
operator. Nobody here has the weights: the revision is what the server says of them, and opens with SAID. Where it says
what tells weights apart (Ollama a digest; llama.cpp counts, bytes and template beside the file's name; vLLM a model of
a hub), two nodes with the same revision may take over from each other. A mere name is no such thing: then the node's
own id is part of the revision, so that no other node has it.
Source: llama.cpp tools/server/server-context.cpp (get_res_model_info, get_res_props, slots); vLLM
vllm/entrypoints/openai/models/protocol.py, vllm/v1/metrics/loggers.py; Ollama docs/api.md (show, tags, ps).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from crypto.digest import digest
from model.config import ModelFacts
from node.upstream_dialect import LLAMA_CPP, LLAMA_CPP_PYTHON, OLLAMA, OPENAI, VLLM, Dialect
from node.work import SAID

CONTEXT_TOKENS_DEFAULT = 4_096  # where the server does not say: Ollama's own default, and few servers have less
CONTEXT_TOKENS_MAX = 1 << 24
NAME_CHARS_MAX = 200
WORD_CHARS_MAX = 64
SHOWN_MAX = 20  # models named in an error
SLOTS_MAX = 1_024
HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OWNERS: Final = {"vllm": VLLM, "llamacpp": LLAMA_CPP, "me": LLAMA_CPP_PYTHON}


class Unfit(Exception):
    """The server cannot be used as it is; the message is for the operator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The one model of a server that this node stands for. id: its name there."""

    id: str
    dialect: Dialect
    facts: ModelFacts
    slots: int | None = None  # requests at a time, where the server says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy the server says that it is; None: it does not say. steps grow while it works."""

    running: int | None = None
    waiting: int = 0
    kv_tokens_total: int | None = None
    kv_tokens_free: int | None = None
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Answers of a server, parsed as JSON; None where it has no such route. show, tags, ps: Ollama's."""

    models: Any
    version: Any = None
    props: Any = None
    show: Any = None
    tags: Any = None
    ps: Any = None


def decoded(content: bytes) -> Any:
    """JSON, or Unfit."""
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError) as exc:
        raise Unfit(f"it does not answer in JSON: {str(exc)[:200]}") from exc


def model_ids(models: Any) -> list[str]:
    """The names in an answer to GET /v1/models. Raises Unfit."""
    rows = models.get("data") if isinstance(models, dict) else None
    if not isinstance(rows, list):
        raise Unfit("its /v1/models is not a list of models: is it an OpenAI-compatible server, and this its address?")
    ids = [row.get("id") for row in rows if isinstance(row, dict)]
    return [each for each in ids if isinstance(each, str) and 0 < len(each) <= 4 * NAME_CHARS_MAX]


def chosen(models: Any, wanted: str | None) -> str:
    """The model to stand for: the one wanted, by its name there or by the one that we give it, else the only one.

    Raises Unfit that lists them.
    """
    ids = model_ids(models)
    listed = ", ".join(ids[:SHOWN_MAX]) + (f" and {len(ids) - SHOWN_MAX} more" if len(ids) > SHOWN_MAX else "")
    if wanted is None:
        if len(ids) == 1:
            return ids[0]
        raise Unfit(f"it has {len(ids)} models, choose one by --model NAME: {listed or 'none'}")
    for each in ids:
        if wanted in (each, public_name(each), each.removesuffix(":latest")):
            return each
    raise Unfit(f"it has no model {wanted!r}; it has {listed or 'none'}")


def dialect_of(models: Any, version: Any) -> Dialect:
    """Which kind of server it is. version: its answer to GET /api/version, which Ollama has."""
    owners = [row.get("owned_by") for row in models["data"] if isinstance(row, dict)]
    for owner, dialect in OWNERS.items():
        if owner in owners:
            return dialect
    return OLLAMA if isinstance(version, dict) and isinstance(version.get("version"), str) else OPENAI


def public_name(model_id: str) -> str:
    """What peers get to read: of a path only the file's name, for where it lies is nobody's business."""
    is_path = model_id.startswith(("/", "~", ".")) or "\\" in model_id or model_id.endswith(".gguf")
    name = re.split(r"[/\\]", model_id.rstrip("/\\"))[-1] if is_path else model_id
    shown = "".join(letter for letter in name if letter.isprintable())
    return shown[:NAME_CHARS_MAX] or "model"


def served_of(told: Told, model_id: str, node: str) -> Served:
    """The model as this node states it. node: this node's id, for a revision that nobody else can have."""
    dialect = dialect_of(told.models, told.version)
    row = next(each for each in told.models["data"] if isinstance(each, dict) and each.get("id") == model_id)
    meta, props = _map(row.get("meta")), _map(told.props)
    slots: int | None = None
    match dialect.name:
        case VLLM.name:
            context, dtype, tells = row.get("max_model_len"), None, _vllm_tells(row)
        case LLAMA_CPP.name:
            settings = _map(props.get("default_generation_settings"))
            context = settings.get("n_ctx") or meta.get("n_ctx") or meta.get("n_ctx_train")
            dtype, tells = meta.get("ftype"), _llama_cpp_tells(meta, props)
            slots = _count(props.get("total_slots"), SLOTS_MAX) or None
        case OLLAMA.name:
            context, dtype, tells = _ollama(told, model_id)
        case _:
            context, dtype, tells = row.get("max_model_len"), None, None
    counted = _count(meta.get("n_params"), 1 << 53), _count(meta.get("n_vocab"), 1 << 31)
    facts = ModelFacts(
        name=public_name(model_id),
        revision=revision_of(dialect, public_name(model_id), tells, node),
        kind="causal",
        context_tokens=_count(context, CONTEXT_TOKENS_MAX) or CONTEXT_TOKENS_DEFAULT,
        dtype=_word(dtype),
        parameters=counted[0],
        vocabulary=counted[1],
    )
    return Served(id=model_id, dialect=dialect, facts=facts, slots=1 if dialect.is_alone else slots)


def revision_of(dialect: Dialect, name: str, tells: object, node: str) -> str:
    """A name for weights that only the server has; tells: what it says that tells weights apart, None: nothing."""
    statement = [dialect.name, name, tells if tells is not None else {"node": node}]
    said = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    return f"{SAID}{dialect.name}:{digest(said).hex()[:16]}"


def _vllm_tells(row: Mapping[str, Any]) -> object:
    """The model's name at a hub; a path says nothing to others, and neither does an adapter's."""
    root = row.get("root")
    if isinstance(root, str) and HUB_NAME.fullmatch(root) and not row.get("parent"):
        return {"root": root}
    return None


def _llama_cpp_tells(meta: Mapping[str, Any], props: Mapping[str, Any]) -> object:
    counts = {key: _count(meta.get(key), 1 << 63) for key in ("n_params", "size", "n_vocab", "n_embd", "n_ctx_train")}
    if not (counts["n_params"] and counts["size"]):
        return None
    path = props.get("model_path")
    file = public_name(f"/{path}") if isinstance(path, str) and path else ""
    return {**counts, "file": file, "template": digest(str(props.get("chat_template") or "").encode()).hex()}


def _ollama(told: Told, model_id: str) -> tuple[object, object, object]:
    """Context, kind of numbers, and what tells weights apart: the digest of the model's manifest."""
    show, known = _map(told.show), _map(told.show).get("parameters")
    trained = next((value for key, value in _map(show.get("model_info")).items() if key.endswith(".context_length")), 0)
    loaded = next((row for row in _rows(told.ps) if model_id in (row.get("name"), row.get("model"))), {})
    set_there = re.search(r"^num_ctx\s+(\d{1,9})\s*$", known, re.MULTILINE) if isinstance(known, str) else None
    context = (
        _count(loaded.get("context_length"), CONTEXT_TOKENS_MAX)
        or (int(set_there[1]) if set_there else 0)
        or min(_count(trained, CONTEXT_TOKENS_MAX) or CONTEXT_TOKENS_DEFAULT, CONTEXT_TOKENS_DEFAULT)
    )
    dtype = _map(show.get("details")).get("quantization_level")
    tag = next((row for row in _rows(told.tags) if model_id in (row.get("name"), row.get("model"))), {})
    digest = tag.get("digest")
    is_digest = isinstance(digest, str) and re.fullmatch(r"(sha256:)?[0-9a-f]{64}", digest) is not None
    return context, dtype, {"digest": str(digest).removeprefix("sha256:")} if is_digest else None


def load_of_slots(slots: Any) -> Load:
    """llama.cpp's GET /slots. Raises Unfit."""
    if not isinstance(slots, list) or not all(isinstance(row, dict) for row in slots):
        raise Unfit("its /slots is not a list of slots")
    busy = [row for row in slots if row.get("is_processing") is True]
    idle = [row for row in slots if row.get("is_processing") is not True]
    decoded_tokens = 0
    for row in busy:
        told = row.get("next_token")
        first = told[0] if isinstance(told, list) and told else told
        decoded_tokens += _count(_map(first).get("n_decoded"), 1 << 53)
    return Load(
        running=len(busy),
        kv_tokens_total=sum(_count(row.get("n_ctx"), CONTEXT_TOKENS_MAX) for row in slots),
        kv_tokens_free=sum(_count(row.get("n_ctx"), CONTEXT_TOKENS_MAX) for row in idle),
        steps=decoded_tokens,
    )


def load_of_metrics(text: str, model_id: str) -> Load:
    """vLLM's GET /metrics: the rows of this model, or all when none names it. Several engines are added up."""
    rows = list(_samples(text))
    own = [row for row in rows if row[1].get("model_name") == model_id] or rows
    running = _sum(own, "vllm:num_requests_running")
    usage = [value for name, _, value in own if name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")]
    sizes = [
        _count(_number(labels.get("num_gpu_blocks")), 1 << 40) * _count(_number(labels.get("block_size")), 1 << 20)
        for name, labels, _ in rows
        if name == "vllm:cache_config_info"
    ]
    total = min(sum(sizes), 1 << 53) or None
    used = min(1.0, max(0.0, sum(usage) / len(usage))) if usage else None
    work = ("vllm:iteration_tokens_total_count", "vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    return Load(
        running=None if running is None else int(running),
        waiting=int(_sum(own, "vllm:num_requests_waiting") or 0),
        kv_tokens_total=total,
        kv_tokens_free=None if total is None or used is None else int(total * (1.0 - used)),
        steps=int(sum(_sum(own, name) or 0 for name in work)),
    )


_SAMPLE: Final = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_WANTED: Final = "vllm:"


def _samples(text: str) -> Iterable[tuple[str, dict[str, str], float]]:
    """The rows of Prometheus text that are vLLM's and finite."""
    for line in text.splitlines():
        found = _SAMPLE.fullmatch(line.strip()) if line.startswith(_WANTED) else None
        if found is None:
            continue
        value = _number(found[3])
        if isinstance(value, float) and 0.0 <= value <= float(1 << 53):
            yield found[1], dict(_LABEL.findall(found[2] or "")), value


def _sum(rows: Iterable[tuple[str, dict[str, str], float]], wanted: str) -> float | None:
    values = [value for name, _, value in rows if name == wanted]
    return min(sum(values), float(1 << 53)) if values else None


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _count(value: object, most: int) -> int:
    """A whole number from 0 to `most`; 0 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        return 0
    return min(int(value), most)


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _rows(value: object) -> list[Mapping[str, Any]]:
    """Ollama's lists of models."""
    models = _map(value).get("models")
    return [row for row in models if isinstance(row, dict)] if isinstance(models, list) else []


def _word(value: object) -> str:
    text = value if isinstance(value, str) else ""
    return "".join(letter for letter in text if letter.isprintable())[:WORD_CHARS_MAX] or "unknown"
