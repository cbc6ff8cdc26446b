"""Targets: what operators, clients and makers of models write: configuration, bodies, templates, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from model.checkpoint import read_checkpoint, read_header
from model.errors import BadInput, BadModel, NotFound
from model.template import RENDERED_CHARS_MAX, ChatTemplate
from node.config import load_config
from node.errors import ConfigError, RequestError
from node.web.schema import ChatRequest, CompletionRequest, EmbeddingsRequest, InferenceRequest, parse
from tests.fuzz.state_targets import folder
from tests.fuzz.target import Target, jsoned
from tests.fuzz.wire_targets import ADDRESS

CHAT: Final = (("system", "be brief"), ("user", "tell me a tale"), ("assistant", "once"))


def config_file() -> Target:
    path = folder() / "app_config.json"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        load_config({}, environment={}, file=path)

    right = {
        "data_dir": "/tmp/x", "http": "127.0.0.1:1", "listen": ["/ip4/0.0.0.0/tcp/0"], "bootstrap": [ADDRESS],
        "network": "main", "mdns": True, "model": "none", "threads": 2, "kv_cache_mb": 64, "log_level": "info",
        "device": "cpu", "psk_file": "~/key",
    }  # fmt: skip
    sections = {
        "//": "said", "app": {"enable": {"model": True, "http": False}}, "app.enable.mdns": False,
        "model": {"model_path": "default", "max_tokens": 9, "temperature": 0.5, "device": "cpu"},
        "model.max_length": 64,
    }  # fmt: skip
    odd = ({"data_dir": "~nobody-of-this-name/x"}, {"http": "[::1]:²"}, {"http": "a:" + "9" * 5000}, {"data_dir": "\0"})
    return Target(read=read, errors=(ConfigError,), values=(right, sections, *odd), pack=jsoned)


def environment() -> Target:
    """Variables, `NAME=value` one a line."""

    def read(raw: bytes) -> None:
        lines = [line.partition("=") for line in raw.decode("utf-8", "surrogateescape").split("\n")]
        load_config({}, environment={name: value for name, _, value in lines})

    right = f"OPENAGI_THREADS=2\nOPENAGI_BOOTSTRAP={ADDRESS},\nOPENAGI_MDNS=false\nHOME=/x\nOPENAGI_HTTP=off"
    right += "\nOPENAGI_TEMPERATURE=0.5"
    odd = (
        "OPENAGI_THREADS=²",
        "OPENAGI_THREADS=" + "9" * 5000,
        "OPENAGI_DATA_DIR=~nobody-of-this-name",
        "OPENAGI_CONFIG=",
    )
    return Target(read=read, errors=(ConfigError,), seeds=(right.encode(), *(each.encode() for each in odd)))


def http_body() -> Target:
    kinds = (ChatRequest, CompletionRequest, EmbeddingsRequest, InferenceRequest)

    def read(raw: bytes) -> None:
        taken = 0
        for kind in kinds:
            try:
                parse(raw, kind)
                taken += 1
            except RequestError:
                continue
        if not taken:
            raise RequestError("none of the four")

    values = (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "stop": ["x"], "logprobs": True},
        {"prompt": ["a", "b"], "max_tokens": 5, "temperature": 0.5, "stream": True, "logit_bias": {}},
        {"input": [[1, 2], [3]], "encoding_format": "base64", "dimensions": 8},
        {"prompt": "a", "input": "b"},
    )
    return Target(read=read, errors=(RequestError,), values=values, pack=jsoned)


def chat_template() -> Target:
    def read(raw: bytes) -> None:
        text = ChatTemplate(raw.decode("utf-8", "replace"), {"bos_token": "<s>", "eos_token": "</s>"}).render(CHAT)
        assert len(text) <= RENDERED_CHARS_MAX

    seeds = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}",
        "{% macro f(x) %}{{ x ~ x }}{% endmacro %}{{ f(f('ab')) }}{% if add_generation_prompt %}:{% endif %}",
        "{% set ns = namespace(n=0) %}{% for m in messages if m.role != 'user' %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n * 'ab' }}{{ messages | tojson(indent=2) }}{{ raise_exception('no') }}",
        "{{ ''.__class__ }}{{ messages[0]['content'].format(1) }}{{ '%s' % 5 }}{{ range(9) | list | join(',') }}",
        "{% generation %}{{ messages | map(attribute='role') | list | sort | unique | first }}{% endgeneration %}"
        "{{ strftime_now('%Y') }}{{ 'abc'[::-1] }}{{ [1,2] + [3] }}{{ 5 // 2 if 1 in (1,) else {'a': 1} }}",
    )
    return Target(
        read=read, errors=(BadModel, BadInput), seeds=tuple(map(str.encode, seeds)), taken_bytes_max=256 << 20
    )


def weights_of(header: Any, body_bytes: int = 24) -> bytes:
    """A safetensors file with this header."""
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(raw).to_bytes(8, "little") + raw + bytes(body_bytes)


HEADER: Final = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def safetensors_header() -> Target:
    path = folder() / "model.safetensors"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        shapes = read_header(path)
        assert all(n >= 0 for shape in shapes.values() for n in shape)

    def pack(value: Any) -> bytes:
        return weights_of(jsoned(value))

    hostile = (weights_of(b"[" * 50_000), weights_of(b'{"a":' * 50_000), b"\xff" * 8, weights_of(b"{}", 0), b"")
    return Target(read=read, errors=(BadModel,), seeds=hostile, values=(HEADER,), pack=pack)


def model_config() -> Target:
    """The config.json of a directory whose other files are right."""
    place = folder()
    (place / "model.safetensors").write_bytes(weights_of(HEADER))
    (place / "tokenizer.json").write_bytes(b"{}")

    def read(raw: bytes) -> None:
        (place / "config.json").write_bytes(raw)
        found = read_checkpoint(place)
        assert found.elements == 8

    values = (
        {"model_type": "llama", "hidden_size": 8, "attn_implementation": "eager", "text_config": {"a": [{"b": 1}]}},
        {"model_type": "bert", "quantization_config": None, "x": {"transformers_weights": "../../etc"}},
    )
    return Target(read=read, errors=(BadModel, NotFound), values=values, pack=jsoned)


def weights_index() -> Target:
    """The index of a model in shards."""
    place = folder()
    (place / "part.safetensors").write_bytes(weights_of(HEADER))
    (place / "tokenizer.json").write_bytes(b"{}")
    (place / "config.json").write_bytes(b'{"model_type": "llama"}')

    def read(raw: bytes) -> None:
        (place / "model.safetensors.index.json").write_bytes(raw)
        assert [file.name for file in read_checkpoint(place).weight_files] == ["part.safetensors"]

    values = ({"metadata": {}, "weight_map": {"a": "part.safetensors", "b": "part.safetensors"}},)
    return Target(read=read, errors=(BadModel, NotFound), values=values, pack=jsoned)


TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "config_file": config_file,
    "environment": environment,
    "http_body": http_body,
    "chat_template": chat_template,
    "safetensors_header": safetensors_header,
    "model_config": model_config,
    "weights_index": weights_index,
}
