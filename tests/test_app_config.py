"""node/app_config.py: the sections of app_config.json, each key read, each switch for its own service alone."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from model.settings import ModelSettings
from model.settings import settings_of as model_settings
from node.app_config import ALWAYS_ON, MODEL_KEYS, SWITCHES, settings_of
from node.config import NodeConfig, load_config
from node.errors import ConfigError

ROOT = Path(__file__).parent.parent
OTHER: dict[str, object] = {  # a value that is not the default
    "model.model_path": "org/name",
    "model.model_type": "causal",
    "model.max_length": 512,
    "model.max_tokens": 77,
    "model.temperature": 0.25,
    "model.device": "cpu",
    "model.dtype": "bfloat16",
    "model.quantize": "int8",
    "model.threads": 3,
    "model.embedding_model": "org/enc",
    "model.max_batch": 5,
    "model.kv_cache_mb": 99,
    "model.cache_mb": 7,
    "model.backend": "openai:http://127.0.0.1:8000",
    "model.backend_key_file": "/key",
}


def loaded(tmp_path: Path, settings: object) -> NodeConfig:
    file = tmp_path / "app_config.json"
    file.write_text(json.dumps(settings))
    return load_config({}, environment={}, file=file)


def nested(dotted: dict[str, object]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, name = key.split(".")
        inner = out
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return out


def changed(config: NodeConfig, plain: NodeConfig) -> set[str]:
    return {name for name in NodeConfig.model_fields if getattr(config, name) != getattr(plain, name)}


def test_every_key_is_a_setting_of_the_node_and_changes_it_alone(tmp_path: Path) -> None:
    """tests/test_config.py shows that each setting of the node has a reader."""
    assert OTHER.keys() == MODEL_KEYS.keys()
    assert set(MODEL_KEYS.values()) | {name for name, _ in SWITCHES.values()} <= NodeConfig.model_fields.keys()
    plain = load_config({}, environment={})
    for key, value in OTHER.items():
        if key == "model.backend_key_file":
            given: dict[str, object] = {key: value, "model.backend": OTHER["model.backend"]}
            plain_too = loaded(tmp_path, {"model.backend": OTHER["model.backend"]})
        else:
            given, plain_too = {key: value}, plain
        for form in (given, nested(given)):
            config = loaded(tmp_path, form)
            assert changed(config, plain_too) == {MODEL_KEYS[key]}, key
            assert str(getattr(config, MODEL_KEYS[key])) == str(value)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_for_its_own_service_alone(tmp_path: Path, switch: str) -> None:
    plain = load_config({}, environment={})
    name, off = SWITCHES[switch]
    for form in ({switch: True}, nested({switch: True})):
        assert changed(loaded(tmp_path, form), plain) == set()
    for form in ({switch: False}, nested({switch: False})):
        config = loaded(tmp_path, form)
        assert changed(config, plain) == {name}
        assert getattr(config, name) == off
    with pytest.raises(ConfigError, match=re.escape(f"{switch} = 'yes': wanted true or false")):
        loaded(tmp_path, {switch: "yes"})


def test_a_service_that_is_off_stays_off_whatever_else_is_set(tmp_path: Path) -> None:
    settings = {"app.enable.model": False, "model": {"model_path": "org/name", "max_tokens": 9}, "http": "127.0.0.1:1"}
    config = loaded(tmp_path, settings)
    assert (config.model, config.max_tokens, config.http) == ("none", 9, "127.0.0.1:1")
    config = loaded(tmp_path, {"app.enable.training": False, "train": "tales", "data": ["/texts"]})
    assert (config.training, config.train) == (False, "tales")
    file = tmp_path / "app_config.json"
    file.write_text(json.dumps(settings))
    assert load_config({"model": "default"}, environment={}, file=file).model == "default"  # a flag wins over the file


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"app": {"enable": {"modle": True}}}, "unknown key 'app.enable.modle'; the known keys there are app.enable."),
        ({"app.enabled.model": True}, "unknown key 'app.enabled.model'"),
        ({"app": {"name": "x"}}, "unknown key 'app.name'"),
        ({"app": True}, "app = True: wanted an object of keys"),
        ({"app": {"enable": True}}, "app.enable = True: wanted an object of keys"),
        ({"model": {"modle_path": "x"}}, "unknown key 'model.modle_path'; the known keys there are model.model_path"),
        ({"model": {"sub": {"a": 1}}}, "unknown key 'model.sub'"),
        ({"model.temperature": "hot"}, "model.temperature = 'hot'"),
        ({"model": {"temperature": 11}}, "model.temperature = 11"),
        ({"model": {"max_length": 0}}, "model.max_length = 0"),
        ({"model": {"max_tokens": 1.5}}, "model.max_tokens = 1.5"),
        ({"model": {"model_type": "gpt"}}, "model.model_type = 'gpt'"),
        ({"model": {"device": "tpu"}, "model.device": "cpu"}, "are the same setting"),
        ({"device": "cpu", "model": {"device": "cpu"}}, "model.device and device are the same setting"),
        ({"app.enable.http": False, "app": {"enable": {"http": True}}}, "app.enable.http is given twice"),
        ({"app.enable.model": True, "model": "none"}, "app.enable.model is true and model is 'none'"),
        ({"app.enable.http": True, "http": "off"}, "app.enable.http is true and http is 'off'"),
        ({"app.enable.gossip": False}, ALWAYS_ON["app.enable.gossip"]),
        ({"network": {"name": "x"}}, "network = {'name': 'x'}"),
        ({"model.max_length": 9, "model.backend": "openai:http://127.0.0.1:8000"}, "--max-length are for a model of"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_as_the_file_has_it(tmp_path: Path, settings: object, wanted: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(wanted)) as caught:
        loaded(tmp_path, settings)
    assert str(tmp_path / "app_config.json") in str(caught.value) or wanted.startswith("--")


@pytest.mark.parametrize("key", ["app", "app.enable", "app.enable.http", "model", "model.device", "network", "x"])
def test_a_value_may_be_nested_as_deep_as_it_likes(tmp_path: Path, key: str) -> None:
    file = tmp_path / "app_config.json"
    for deep in ("[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900):
        file.write_text("{" + json.dumps(key) + ":" + deep + "}")
        with pytest.raises(ConfigError) as caught:
            load_config({}, environment={}, file=file)
        assert len(str(caught.value)) < 2_000


def test_comments_are_left_out() -> None:
    assert settings_of({"//": "said", "// more": {"x": 1}, "model": {"//": 5, "device": "cpu"}}).keys() == {"device"}


def test_the_example_of_the_docs_is_good_and_has_every_key(tmp_path: Path) -> None:
    file = ROOT / "docs" / "app_config.example.json"
    config = load_config({}, environment={}, file=file)
    assert config.http == "127.0.0.1:8765"
    told = json.loads(file.read_text())
    shown = {f"model.{key}" for key in told["model"]} | {f"app.enable.{key}" for key in told["app"]["enable"]}
    left_out = {"model.backend", "model.backend_key_file"}  # instead of a model here; its comment names them
    assert {key for key in shown if "//" not in key} == (MODEL_KEYS.keys() | SWITCHES.keys()) - left_out
    assert all(key in file.read_text() for key in left_out)


def test_the_module_functions_read_the_same_section(tmp_path: Path) -> None:
    """model/service.py and the node are set by one file."""
    file = ROOT / "docs" / "app_config.example.json"
    known = {field.name for field in fields(ModelSettings)}
    assert known <= {key.removeprefix("model.") for key in MODEL_KEYS}
    config, settings = load_config({}, environment={}, file=file), model_settings(json.loads(file.read_text()))
    for name in known - {"model_path", "embedding_model"}:
        assert getattr(settings, name) == getattr(config, MODEL_KEYS[f"model.{name}"]), name


def test_the_environment_sets_them_too() -> None:
    told = {"OPENAGI_TEMPERATURE": "0.5", "OPENAGI_MAX_TOKENS": "9", "OPENAGI_TRAINING": "false"}
    client = {"OPENAGI_NODE": "http://127.0.0.1:1", "OPENAGI_API_KEY": "k"}  # of the commands: no node minds them
    config = load_config({}, environment={**told, **client})
    assert (config.temperature, config.max_tokens, config.training) == (0.5, 9, False)
    with pytest.raises(ConfigError, match="OPENAGI_TEMPERATURE='hot' is not a number"):
        load_config({}, environment={"OPENAGI_TEMPERATURE": "hot"})
