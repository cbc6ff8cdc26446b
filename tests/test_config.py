"""node/config.py: every key is read, every bad one is named, and the nearest source wins."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from node.config import NodeConfig, load_config, parse_http
from node.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "app_config.json"
    file.write_text(json.dumps({"network": "from-file", "threads": 3, "max_batch": 7}))
    config = load_config(
        {"network": "from-flag"}, environment={"OPENAGI_NETWORK": "from-env", "OPENAGI_THREADS": "5"}, file=file
    )
    assert (config.network, config.threads, config.max_batch) == ("from-flag", 5, 7)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"modle": "x"}, "unknown key 'modle'"),
        ({"threads": "two"}, "threads"),
        ({"threads": 0}, "threads"),
        ({"max_batch": True}, "max_batch"),
        ({"cache_mb": -1}, "cache_mb"),
        ({"http": "nonsense"}, "HOST:PORT"),
        ({"network": "UPPER CASE"}, "network"),
        ({"device": "tpu"}, "device"),
        ({"quantize": "int3"}, "quantize"),
        ({"bootstrap": ["/ip4/1.2.3.4/tcp/1"]}, "/p2p/"),
        ([1, 2], "wanted an object"),
        ({"data_dir": "~nobody-of-this-name/x"}, "no user of that name"),
        ({"ready_file": "a\0b"}, "no NUL"),
        ({"http": "127.0.0.1:²"}, "HOST:PORT"),
        ({"network": "x" * 5000}, "..."),
    ],
)
def test_a_bad_key_in_the_file_is_named_with_the_file(tmp_path: Path, settings: object, wanted: str) -> None:
    file = tmp_path / "app_config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=re.escape(wanted)) as caught:
        load_config({}, environment={}, file=file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_missing_or_not_json_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        load_config({}, environment={}, file=tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        load_config({}, environment={}, file=broken)
    broken.write_text('{"network": "main",}')
    with pytest.raises(ConfigError, match="no comma may stand before"):
        load_config({}, environment={}, file=broken)


@pytest.mark.parametrize(
    ("variable", "text", "wanted"),
    [
        ("OPENAGI_MODLE", "x", "OPENAGI_MODLE is not a setting"),
        ("OPENAGI_THREADS", "two", "not a whole number"),
        ("OPENAGI_THREADS", "²", "not a whole number"),
        ("OPENAGI_THREADS", "9" * 5000, "not a whole number"),
        ("OPENAGI_MDNS", "maybe", "not true or false"),
    ],
)
def test_a_bad_environment_variable_is_named(variable: str, text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_config({}, environment={variable: text})


@pytest.mark.slow
def test_a_file_may_be_nested_as_deep_as_it_likes(tmp_path: Path) -> None:
    file = tmp_path / "app_config.json"
    for depth in (10, *range(700, 1000, 5), 100_000):
        file.write_text('{"threads": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ConfigError):
            load_config({}, environment={}, file=file)


def test_environment_values_get_their_types() -> None:
    config = load_config(
        {},
        environment={
            "OPENAGI_LISTEN": "/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.1/tcp/1",
            "OPENAGI_MDNS": "false",
            "OPENAGI_KV_CACHE_MB": "12",
            "OPENAGI_CACHE_MB": "0",
        },
    )
    assert (len(config.listen), config.mdns, config.kv_cache_mb, config.cache_mb) == (2, False, 12, 0)


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"network": "n1"}')
    assert load_config({}, environment={"OPENAGI_CONFIG": str(file)}).network == "n1"


def test_a_bind_beyond_loopback_needs_open() -> None:
    with pytest.raises(ConfigError, match="--open"):
        load_config({"http": "0.0.0.0:8765"}, environment={})
    assert load_config({"http": "0.0.0.0:8765", "open": True}, environment={}).open


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_a_cpu_is_quantized(device: str) -> None:
    with pytest.raises(ConfigError, match="--quantize int8 is for models on a CPU: leave it out, or choose --device"):
        load_config({"quantize": "int8", "device": device}, environment={})
    assert load_config({"quantize": "none", "device": device}, environment={}).device == device
    assert load_config({"quantize": "int4"}, environment={}).quantize == "int4"


def test_http_forms() -> None:
    assert parse_http("off") is None
    address = parse_http("[::1]:0")
    assert address is not None
    assert (address.host, address.port) == ("::1", 0)


def test_what_a_run_needs_is_said_at_once() -> None:
    config = load_config(
        {"train": "tales", "data": ["/texts", "~/more"], "train_hours": "22-6", "train_on_battery": True},
        environment={},
    )
    assert config.data == (Path("/texts"), Path("~/more").expanduser())
    assert (config.train, config.train_hours, config.train_on_battery) == ("tales", "22-6", True)
    for settings, wanted in (
        ({"train": "tales"}, "add --data FILE or --data FOLDER"),
        ({"data": ["/texts"]}, "say in which run by --train RUN"),
        ({"train": "tales", "data": ["/texts"], "model": "none"}, "--model none hosts none"),
        ({"train_hours": "22"}, "train_hours = '22': '22' is not FROM-TO in hours of the day, as 22-6"),
        ({"train": ""}, "train"),
        ({"train_on_battery": 1}, "train_on_battery"),
    ):
        with pytest.raises(ConfigError, match=re.escape(wanted)):
            load_config(settings, environment={})


def test_training_can_be_set_in_the_environment() -> None:
    config = load_config(
        {},
        environment={
            "OPENAGI_TRAIN": "tales",
            "OPENAGI_DATA": "/texts,/more",
            "OPENAGI_TRAIN_HOURS": "9-17",
            "OPENAGI_TRAIN_ON_BATTERY": "true",
        },
    )
    assert (config.train, config.data) == ("tales", (Path("/texts"), Path("/more")))
    assert (config.train_hours, config.train_on_battery) == ("9-17", True)


def test_every_key_has_a_reader() -> None:
    """A key that no file outside node/config.py reads would be a setting that does nothing."""
    sources = [
        path.read_text() for path in (ROOT / "node").rglob("*.py") if path.name not in ("config.py", "__main__.py")
    ]
    readers = {"http": "http_address", "bootstrap_file": "bootstrap_path", "psk_file": "psk()", "open": "."}
    unread = [
        key
        for key in NodeConfig.model_fields
        if not any(f"config.{readers.get(key, key)}" in source for source in sources) and key != "open"
    ]
    assert unread == []
