"""node/upstream_facts.py: what servers say of themselves, and names for weights that nobody here has."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip.messages import ModelKind, ModelOffer
from node.upstream_dialect import LLAMA_CPP, LLAMA_CPP_PYTHON, OLLAMA, OPENAI, VLLM
from node.upstream_facts import (
    CONTEXT_TOKENS_DEFAULT,
    Load,
    Served,
    Told,
    Unfit,
    chosen,
    decoded,
    dialect_of,
    load_of_metrics,
    load_of_slots,
    model_ids,
    public_name,
    served_of,
)
from node.work import SAID

DIGEST = "ab" * 32
META = {
    "n_params": 7_000_000,
    "size": 4_000_000,
    "n_vocab": 32_000,
    "n_embd": 64,
    "n_ctx_train": 8_192,
    "ftype": "Q4_K",
}


def models(*ids: str, owner: str = "someone", **more: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": each, "owned_by": owner, **more} for each in ids]}


def served(told: Told, node: str = "us") -> Served:
    return served_of(told, model_ids(told.models)[0], node)


def test_the_only_model_is_taken_and_one_of_several_must_be_named() -> None:
    assert chosen(models("a"), None) == "a"
    assert chosen(models("a", "b"), "b") == "b"
    assert chosen(models("/x/y.gguf", "b:latest"), "y.gguf") == "/x/y.gguf"
    assert chosen(models("/x/y.gguf", "b:latest"), "b") == "b:latest"
    with pytest.raises(Unfit, match=re.escape("it has 2 models, choose one by --model NAME: a, b")):
        chosen(models("a", "b"), None)
    with pytest.raises(Unfit, match=re.escape("it has no model 'c'; it has a, b")):
        chosen(models("a", "b"), "c")
    with pytest.raises(Unfit, match="and 80 more"):
        chosen(models(*map(str, range(100))), None)
    with pytest.raises(Unfit, match="none"):
        chosen(models(), None)


@pytest.mark.parametrize("told", [[], {}, {"data": "x"}, "hello", None])
def test_what_is_no_list_of_models_is_said(told: Any) -> None:
    with pytest.raises(Unfit, match="this its address"):
        model_ids(told)


def test_servers_are_told_apart() -> None:
    for owner, dialect in (("vllm", VLLM), ("llamacpp", LLAMA_CPP), ("me", LLAMA_CPP_PYTHON), ("x", OPENAI)):
        assert dialect_of(models("a", owner=owner), None) is dialect
    assert dialect_of(models("a", owner="library"), {"version": "0.9"}) is OLLAMA
    assert dialect_of(models("a", owner="library"), {"detail": "Not Found"}) is OPENAI


def test_what_vllm_says() -> None:
    told = Told(models=models("Qwen/Qwen3-8B", owner="vllm", max_model_len=40_960, root="Qwen/Qwen3-8B"))
    facts = served(told).facts
    assert (facts.name, facts.context_tokens, facts.dtype) == ("Qwen/Qwen3-8B", 40_960, "unknown")
    assert facts.revision.startswith(f"{SAID}vllm:")


def test_what_llama_cpp_says() -> None:
    props = {"total_slots": 6, "default_generation_settings": {"n_ctx": 2_048}, "model_path": "/home/me/q.gguf"}
    one = served(Told(models=models("q.gguf", owner="llamacpp", meta=META), props=props))
    assert one.slots == 6
    assert (one.facts.context_tokens, one.facts.dtype) == (2_048, "Q4_K")
    assert (one.facts.parameters, one.facts.vocabulary) == (7_000_000, 32_000)
    assert served(Told(models=models("q", owner="llamacpp", meta=META))).facts.context_tokens == 8_192


def test_what_ollama_says() -> None:
    show = {
        "model_info": {"general.architecture": "qwen3", "qwen3.context_length": 40_960},
        "details": {"quantization_level": "Q4_K_M"},
        "parameters": "stop  x\nnum_ctx                        8192\n",
    }
    tags = {"models": [{"name": "other", "digest": "0" * 64}, {"name": "qwen3:8b", "digest": DIGEST}]}
    told = Told(models=models("qwen3:8b", owner="library"), version={"version": "1"}, show=show, tags=tags)
    assert (served(told).facts.context_tokens, served(told).facts.dtype) == (8_192, "Q4_K_M")
    show["parameters"] = ""
    assert served(told).facts.context_tokens == CONTEXT_TOKENS_DEFAULT, (
        "what it was trained on is not what it runs with"
    )
    loaded = {"models": [{"name": "qwen3:8b", "context_length": 16_384}]}
    assert served(dataclasses.replace(told, ps=loaded)).facts.context_tokens == 16_384


def revisions(told: Told) -> tuple[str, str]:
    """Of two nodes whose servers say the same."""
    return served(told, "us").facts.revision, served(told, "them").facts.revision


SHARED = {
    "ollama": Told(
        models=models("q", owner="library"),
        version={"version": "1"},
        tags={"models": [{"name": "q", "digest": DIGEST}]},
    ),
    "llama.cpp": Told(models=models("q", owner="llamacpp", meta=META), props={"model_path": "/x/q.gguf"}),
    "vllm of a hub": Told(models=models("q", owner="vllm", root="Qwen/Qwen3-8B")),
}
OWN = {
    "ollama without a digest": Told(models=models("q", owner="library"), version={"version": "1"}),
    "llama.cpp without counts": Told(models=models("q", owner="llamacpp")),
    "vllm of a path": Told(models=models("q", owner="vllm", root="/models/q")),
    "vllm of a path of two names": Told(models=models("q", owner="vllm", root="./models/q")),
    "vllm's adapter": Told(models=models("q", owner="vllm", root="a/b", parent="c/d")),
    "llama-cpp-python": Told(models=models("q", owner="me")),
    "a name and no more": Told(models=models("q")),
}


@pytest.mark.parametrize("told", SHARED.values(), ids=SHARED.keys())
def test_what_tells_weights_apart_is_shared_by_nodes(told: Told) -> None:
    assert len(set(revisions(told))) == 1


@pytest.mark.parametrize("told", OWN.values(), ids=OWN.keys())
def test_a_mere_name_is_this_nodes_own(told: Told) -> None:
    """Two servers with a `q` may have anything: nobody may take over from another."""
    assert len(set(revisions(told))) == 2


def test_other_weights_have_other_revisions() -> None:
    seen = set()
    for size, path, template in (
        (1, "/x/q.gguf", "a"),
        (2, "/x/q.gguf", "a"),
        (1, "/x/p.gguf", "a"),
        (1, "/x/q.gguf", "b"),
    ):
        meta, props = {**META, "size": size}, {"model_path": path, "chat_template": template}
        seen.add(served(Told(models=models("q", owner="llamacpp", meta=meta), props=props)).facts.revision)
    assert len(seen) == 4
    elsewhere = Told(models=models("q", owner="llamacpp", meta=META), props={"model_path": "/home/you/q.gguf"})
    assert served(elsewhere).facts.revision == served(SHARED["llama.cpp"]).facts.revision, "where it lies is no matter"


def test_paths_stay_here() -> None:
    for model_id in ("/home/me/secret/q.gguf", "C:\\Users\\me\\secret\\q.gguf", "./secret/q.gguf", "~/secret/q.gguf"):
        assert public_name(model_id) == "q.gguf"
    assert public_name("org/model") == "org/model"
    assert public_name("qwen3:8b") == "qwen3:8b"


def test_slots() -> None:
    rows = [
        {"n_ctx": 100, "is_processing": True, "next_token": [{"n_decoded": 7}]},
        {"n_ctx": 100, "is_processing": True, "next_token": {"n_decoded": 5}},
        {"n_ctx": 100, "is_processing": False},
    ]
    assert load_of_slots(rows) == Load(running=2, kv_tokens_total=300, kv_tokens_free=100, steps=12)
    with pytest.raises(Unfit):
        load_of_slots({"error": "no"})


METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 1.0
vllm:num_requests_running{engine="0",model_name="b"} 9.0
vllm:num_requests_waiting{engine="0",model_name="a"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.75
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000",path="a \\"b\\" }"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1000"} 1.0
vllm:iteration_tokens_total_count{engine="0",model_name="a"} 70.0
vllm:prompt_tokens_total{engine="0",model_name="a"} NaN
process_resident_memory_bytes 1e9
"""


def test_vllms_metrics() -> None:
    wanted = Load(running=4, waiting=2, kv_tokens_total=32_000, kv_tokens_free=16_000, steps=70)
    assert load_of_metrics(METRICS, "a") == wanted
    assert load_of_metrics(METRICS, "unnamed").running == 13
    assert load_of_metrics("", "a") == Load()
    old = (
        'vllm:gpu_cache_usage_perc{model_name="a"} 0.5\nvllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1'
    )
    assert load_of_metrics(old, "a") == Load()


@given(st.text(st.sampled_from('vllm:num_requests_running{}="\\ 0123456789.eE+-\n\tab'), max_size=200))
def test_any_metrics_give_a_load(text: str) -> None:
    load = load_of_metrics("vllm:num_requests_running" + text, "a")
    assert load.waiting >= 0
    assert load.running is None or 0 <= load.running <= 1 << 53


KEYS = [
    "data",
    "id",
    "meta",
    "n_ctx",
    "max_model_len",
    "root",
    "models",
    "name",
    "digest",
    "parameters",
    "details",
    "default_generation_settings",
    "total_slots",
    "model_path",
    "model_info",
    "a.context_length",
    "n_params",
    "context_length",
    "quantization_level",
    "size",
    "is_processing",
    "next_token",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)


@given(st.sampled_from(["vllm", "llamacpp", "me", "library"]), st.text(min_size=1, max_size=300), JSON, JSON, JSON)
def test_whatever_it_says_is_an_offer_or_unfit(owner: str, name: str, row: Any, props: Any, more: Any) -> None:
    listed = {"data": [more, {**(row if isinstance(row, dict) else {}), "id": name, "owned_by": owner}]}
    try:
        found = chosen(listed, name)
        one = served_of(
            Told(models=listed, version={"version": "1"}, props=props, show=more, tags=row, ps=props), found, "us"
        )
    except Unfit:
        return
    facts = one.facts
    offer = ModelOffer(
        name=facts.name,
        revision=facts.revision,
        kind=ModelKind(facts.kind),
        context_tokens=facts.context_tokens,
        dtype=facts.dtype,
    )
    assert msgspec.convert(msgspec.to_builtins(offer), ModelOffer) == offer, "within an advert's bounds"
    assert facts.revision.isascii()
    assert one.slots is None or one.slots >= 1


@pytest.mark.parametrize("content", [b"", b"<html>", b"[" * 100_000, b"\xff"], ids=["none", "html", "deep", "bytes"])
def test_what_is_no_json_is_unfit(content: bytes) -> None:
    with pytest.raises(Unfit, match="does not answer in JSON"):
        decoded(content)
    assert decoded(json.dumps({"a": 1}).encode()) == {"a": 1}
