"""The metrics of serving: requests of this node's own clients, the engine, the caches.

Rules: core. A row says name, type, meaning, unit, who counts it and where it is read; docs/METRICS.md is made from the
rows, and /metrics shows nothing else. Names of vLLM V1 keep their suffix after `openagi_`, so that its dashboards need
another prefix only; a metric means the same here or has another name.
Source: SERVING.md, "Names people already have dashboards for"; vLLM V1 `vllm/v1/metrics/loggers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from model.histogram import Distribution
from node.errors import REQUEST_ERRORS
from node.metric import (
    MODEL,
    Reader,
    Sample,
    Told,
    at,
    backend_up,
    by_kind,
    count,
    engine_count,
    gauge,
    of_engine,
    of_models,
    spread,
)
from node.tallies import RowStatistics

FRONT: Final = "node/tallies.py, requests of this node's own clients"
ENGINE: Final = "model/engine.py, whoever asks"


def _answers(row: RowStatistics) -> int:
    return sum(row.finished.values()) + row.embedded


def _average_ms(row: RowStatistics) -> Iterator[Sample]:
    if answers := _answers(row):
        yield (), 1000 * (row.request_s.sum + row.embed_s.sum) / answers


def _successes(row: RowStatistics) -> Iterator[Sample]:
    for reason in ("stop", "length"):
        yield (reason,), row.finished.get(reason, 0)
    yield ("abort",), row.cancelled


def _errors(row: RowStatistics) -> Iterator[Sample]:
    for code in sorted({*REQUEST_ERRORS, *row.errors}):
        yield (code,), row.errors.get(code, 0)


def _timing(name: str) -> Reader:
    def what(told: Told, _: object) -> Distribution | None:
        timings = told.measured.engine
        return None if timings is None else getattr(timings, name)

    return of_engine(what)


def _running(_: Told, model: Any) -> int:
    return int(model["engine"]["slots_total"] - model["engine"]["slots_free"])


def _waiting(_: Told, model: Any) -> int:
    return int(model["engine"]["queue_length"] + model.get("starts_waiting", 0))


def _kv_usage(_: Told, model: Any) -> float | None:
    total = model["engine"]["kv_tokens_total"]
    return 1 - model["engine"]["kv_tokens_free"] / total if total else None


REQUESTS: Final = (
    count("prompt_tokens_total", "Tokens of prompts.", FRONT, of_models(lambda row: [((), row.prompt_tokens)]), *MODEL),
    count(
        "generation_tokens_total",
        "Tokens of answers, as they came.",
        FRONT,
        of_models(lambda row: [((), row.generation_tokens)]),
        *MODEL,
    ),
    count(
        "request_success_total",
        "Texts that ended whole (stop, length), and requests whose client left (abort).",
        FRONT,
        of_models(_successes),
        *MODEL,
        "finished_reason",
    ),
    spread(
        "time_to_first_token_seconds",
        "From a request's arrival to its first token, wherever it was made.",
        FRONT,
        of_models(lambda row: [((), row.first_token_s)]),
        *MODEL,
        unit="s",
    ),
    spread(
        "inter_token_latency_seconds",
        "From token to token; of several that come at once each has its share. Answers that were kept are left out.",
        FRONT,
        of_models(lambda row: [((), row.token_s)]),
        *MODEL,
        unit="s",
    ),
    spread(
        "e2e_request_latency_seconds",
        "From the arrival of a request for text to its whole answer.",
        FRONT,
        of_models(lambda row: [((), row.request_s)]),
        *MODEL,
        unit="s",
    ),
    spread(
        "embedding_request_latency_seconds",
        "From the arrival of a request for vectors to the last of them.",
        FRONT,
        of_models(lambda row: [((), row.embed_s)]),
        *MODEL,
        unit="s",
    ),
    count(
        "inference_count_total",
        "Texts and vectors answered whole.",
        FRONT,
        of_models(lambda r: [((), _answers(r))]),
        *MODEL,
    ),
    gauge("average_latency_ms", "Of these, since start.", FRONT, of_models(_average_ms), *MODEL, unit="ms"),
    count(
        "error_count_total",
        "Requests that ended in an error; without a model where none was found.",
        FRONT,
        of_models(_errors),
        *MODEL,
        "code",
    ),
    gauge("throughput_window_seconds", "What the next four are over.", FRONT, at("throughput.window_s"), unit="s"),
    gauge("requests_per_second", "That came.", FRONT, at("throughput.requests_per_s"), unit="1/s"),
    gauge("prompt_tokens_per_second", "Of requests that ended.", FRONT, at("throughput.prompt_tok_s"), unit="1/s"),
    gauge("generation_tokens_per_second", "That came.", FRONT, at("throughput.generation_tok_s"), unit="1/s"),
    gauge("errors_per_second", "Requests that ended so.", FRONT, at("throughput.errors_per_s"), unit="1/s"),
    gauge(
        "requests_open", "Requests of own clients that have not ended.", "node/inference.py", at("inference.running")
    ),
)

ENGINES: Final = (
    gauge("num_requests_running", "In the running batch.", ENGINE, of_engine(_running), *MODEL),
    gauge("num_requests_waiting", "Admitted, and not in it.", ENGINE, of_engine(_waiting), *MODEL),
    gauge(
        "kv_cache_usage_perc",
        "KV in use, 0 to 1; what is only kept counts as free.",
        ENGINE,
        of_engine(_kv_usage),
        *MODEL,
    ),
    count(
        "prefix_cache_queries_total",
        "Tokens of requests when they were admitted, again after a preemption.",
        ENGINE,
        engine_count("queried_tokens"),
        *MODEL,
    ),
    count(
        "prefix_cache_hits_total", "Of these, those whose KV was there.", ENGINE, engine_count("reused_tokens"), *MODEL
    ),
    spread("iteration_tokens_total", "Tokens read and made in one step.", ENGINE, _timing("step_tokens"), *MODEL),
    spread(
        "request_queue_time_seconds",
        "From a request's coming to the engine to its first run.",
        ENGINE,
        _timing("queue_s"),
        *MODEL,
        unit="s",
    ),
    spread(
        "request_prefill_time_seconds", "From there to its first token.", ENGINE, _timing("prefill_s"), *MODEL, unit="s"
    ),
    spread(
        "request_decode_time_seconds",
        "From there to its end, of requests that finished.",
        ENGINE,
        _timing("decode_s"),
        *MODEL,
        unit="s",
    ),
    count("engine_steps_total", "Forward passes.", ENGINE, engine_count("steps"), *MODEL),
    count(
        "engine_prefilled_tokens_total", "Tokens of prompts read in.", ENGINE, engine_count("prefilled_tokens"), *MODEL
    ),
    count(
        "engine_decoded_tokens_total",
        "Tokens of answers read in, each to make the next one.",
        ENGINE,
        engine_count("decoded_tokens"),
        *MODEL,
    ),
    count(
        "engine_recomputed_tokens_total",
        "A second time, after a preemption.",
        ENGINE,
        engine_count("recomputed_tokens"),
        *MODEL,
    ),
    count(
        "num_preemptions_total", "Requests that lost their KV to others.", ENGINE, engine_count("preemptions"), *MODEL
    ),
    count("engine_finished_total", "Requests answered whole.", ENGINE, engine_count("finished"), *MODEL),
    count("engine_failed_total", "Requests ended by an error.", ENGINE, engine_count("failed"), *MODEL),
    count("engine_cancelled_total", "Requests whose owner left.", ENGINE, engine_count("cancelled"), *MODEL),
    gauge("engine_slots", "Requests that may run at a time.", ENGINE, engine_count("slots_total"), *MODEL),
    gauge("hosted_requests", "Admitted and not ended, texts and vectors.", "node/backend.py", at("model.running")),
    gauge(
        "queued_bytes",
        "Of the texts of requests that have not ended.",
        "node/room.py",
        at("model.queued_bytes"),
        unit="bytes",
    ),
    gauge(
        "backend_up",
        "Whether what answers here can: 1, or 0 with the reason in the status.",
        "node/backend.py",
        backend_up,
        "kind",
        "server",
    ),
)

_CACHE: Final = "node/cache.py"
_KINDS: Final = ("completion", "embedding")
_EMBEDDING: Final = "node/embedding.py, whoever asks"
CACHES: Final = (
    count(
        "response_cache_queries_total",
        "Answers and vectors looked for in the cache.",
        _CACHE,
        by_kind("model.cache.queries", *_KINDS),
        "kind",
    ),
    count("response_cache_hits_total", "Of these, found.", _CACHE, by_kind("model.cache.hits", *_KINDS), "kind"),
    count("response_cache_evictions_total", "Put out for newer ones.", _CACHE, at("model.cache.evicted")),
    gauge("response_cache_entries", "Kept now.", _CACHE, at("model.cache.entries")),
    gauge("response_cache_bytes", "Memory that they take.", _CACHE, at("model.cache.bytes"), unit="bytes"),
    count("embedding_texts_total", "Texts turned into vectors.", _EMBEDDING, at("model.embedding.texts")),
    count("embedding_tokens_total", "Their tokens.", _EMBEDDING, at("model.embedding.tokens")),
    count(
        "embedding_padded_tokens_total",
        "Tokens that went through the model for them, padding among them.",
        _EMBEDDING,
        at("model.embedding.padded_tokens"),
    ),
    gauge("embedding_requests_waiting", "Not ended.", _EMBEDDING, at("model.embedding.waiting")),
)
