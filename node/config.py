"""Every setting of a node, once: composed from file, environment and flags, checked, and handed down.

Rules: flags win over environment, environment over file. An unknown or badly typed key is an error that names it.
The only file that reads the environment. Every key has a reader: tests/test_config.py proves it.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from node.app_config import Setting, settings_of
from node.errors import ConfigError
from node.training_pause import hours_of
from node.work import TOKENS_MAX
from p2p.host_config import PSK_BYTES

KEY_FILE = "identity.key"  # in the data directory
ENVIRONMENT_PREFIX = "OPENAGI_"
CLIENT_VARIABLES = frozenset({"OPENAGI_NODE", "OPENAGI_API_KEY"})  # of the commands that ask a node, not of a node
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_LISTS = frozenset({"listen", "bootstrap", "data", "hosts", "origins", "wallets"})
_DECIMALS = frozenset({"temperature", "train_epsilon"})
_NUMBERS = frozenset(
    (
        "max_length", "max_tokens", "threads", "max_batch", "kv_cache_mb", "cache_mb", "memory_mb", "direct_port",
        "upload_mb_s",
    )
)  # fmt: skip
_FLAGS = frozenset(
    (
        "mdns", "relay", "training", "log_json", "train_on_battery", "train_when_busy", "api_keys", "strangers",
        "memory", "remember_text", "remember_peers", "foresight", "self_report",
    )
)  # fmt: skip
_shown = reprlib.Repr()  # a setting's value in an error: cut, and no deeper than it can be printed
_shown.maxstring = _shown.maxother = 200


def _path(value: object) -> object:
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ValueError("a path has no NUL character")
    try:
        return Path(value).expanduser()
    except RuntimeError as exc:
        raise ValueError("there is no user of that name, and so no home directory; write the path in full") from exc


FilePath = Annotated[Path, BeforeValidator(_path)]


class HttpAddress(BaseModel):
    """Where the HTTP door listens; port 0 takes any free one."""

    model_config = ConfigDict(frozen=True)
    host: str
    port: int = Field(ge=0, le=65535)


class NodeConfig(BaseModel):
    """The settings of one node. Paths are absolute or relative to the working directory; sizes carry their unit."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    data_dir: FilePath = Field(default_factory=lambda: Path(platformdirs.user_data_dir("openagi")))
    http: str = "127.0.0.1:8765"
    listen: tuple[str, ...] = ()  # empty: any free TCP port on every real interface and loopback
    bootstrap: tuple[str, ...] = ()
    bootstrap_file: FilePath | None = None  # default: bootstrap_peers.json of the checkout, when it is there
    network: str = Field(default="main", pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")
    psk_file: FilePath | None = None
    mdns: bool = True
    direct_port: int = Field(default=0, ge=0, le=65535)  # TCP port of the direct channels for bulk; 0: any free one
    upload_mb_s: int = Field(default=100, ge=1, le=100_000)  # of blobs to all peers together, 10^6 bytes a second
    relay: bool = True  # carry others' relayed connections, within bounds, while this node can be reached
    model: str = Field(default="default", min_length=1)  # a name, a path or none
    model_type: Literal["auto", "causal", "encoder"] = "auto"  # what the model must be
    max_length: int | None = Field(default=None, ge=1, le=1 << 20)  # tokens of prompt and answer; None: the model's own
    max_tokens: int | None = Field(default=None, ge=1, le=TOKENS_MAX)  # of an answer whose request names no limit
    temperature: float | None = Field(default=None, ge=0.0, le=10.0)  # of a request that names none
    embedding_model: str | None = None
    backend: str = "transformers"  # or openai:URL of a server that answers in this node's place
    backend_key_file: FilePath | None = None  # the key that this server wants
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["none", "int8", "int4"] = "none"  # weights of linear layers, on a CPU
    threads: int = Field(default_factory=lambda: max(1, (os.cpu_count() or 2) - 1), ge=1, le=1024)
    max_batch: int = Field(default=16, ge=1, le=1024)
    kv_cache_mb: int = Field(default=256, ge=1, le=1 << 20)
    cache_mb: int = Field(default=32, ge=0, le=1 << 20)  # of answers and vectors kept for who asks again; 0: none
    training: bool = True  # False: in no run, whatever was wanted before
    train: str | None = Field(default=None, min_length=1, max_length=80)  # a run to join, by name or id
    data: tuple[FilePath, ...] = ()  # text to train on, which never leaves
    train_hours: str | None = None  # FROM-TO, local hours of the day
    train_on_battery: bool = False
    train_when_busy: bool = False  # whatever load is expected
    train_epsilon: float | None = Field(default=None, gt=0.0, le=1000.0)  # train privately, within this epsilon
    memory: bool = True  # keep what the node did and how it was, in its data directory
    memory_mb: int = Field(default=2_000, ge=2, le=1 << 20)  # that the memory may take on disk, 10^6 bytes each
    remember_peers: bool = True  # which of them answered before a restart, as a hint to routing
    foresight: bool = True  # decline at once what would miss its deadline, as far as that is foretold
    remember_text: bool = False  # keep what own clients asked and got, unless they say that it is private
    ready_file: FilePath | None = None
    open: bool = False  # answer anybody on a bind that is not loopback
    api_keys: bool = False  # answer only who has an API key, or signs
    strangers: bool = True  # answer signed requests of keys that nobody vouched for
    wallets: tuple[str, ...] = ()  # that may sign in: addresses, or files of them; empty: any
    self_report: bool = False  # chats of who may look may ask the node itself for its state
    hosts: tuple[str, ...] = ()  # names of this node beside its addresses
    origins: tuple[str, ...] = ()  # of pages that may ask
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    @field_validator("listen", "bootstrap", "data", "wallets", "hosts", "origins", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("bootstrap")
    @classmethod
    def _names_the_peer(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if not address.startswith("/") or "/p2p/" not in address:
                raise ValueError(
                    f"{address!r} is not a multiaddr with the peer's id, as /ip4/1.2.3.4/tcp/4001/p2p/12D3K…"
                )
        return value

    @field_validator("train_hours")
    @classmethod
    def _hours_parse(cls, value: str | None) -> str | None:
        if value is not None:
            hours_of(value)
        return value

    @field_validator("backend")
    @classmethod
    def _backend_parses(cls, value: str) -> str:
        parse_backend(value)
        return value

    @field_validator("http")
    @classmethod
    def _http_parses(cls, value: str) -> str:
        parse_http(value)
        return value

    def http_address(self) -> HttpAddress | None:
        """Host and port of the HTTP door, None when it is off."""
        return parse_http(self.http)

    def psk(self) -> bytes | None:
        """The private network's key. Raises ConfigError."""
        if self.psk_file is None:
            return None
        wanted = f"{2 * PSK_BYTES} hexadecimal digits"
        try:
            text = self.psk_file.read_text().strip()
            key = bytes.fromhex(text)
        except OSError as exc:
            raise ConfigError(f"cannot read the pre-shared key {self.psk_file}: {exc.strerror}") from exc
        except ValueError as exc:
            raise ConfigError(f"the pre-shared key {self.psk_file} must hold {wanted}") from exc
        if len(key) != PSK_BYTES:
            raise ConfigError(f"the pre-shared key {self.psk_file} has {len(text)} digits, wanted {wanted}")
        return key

    def upstream_url(self) -> str | None:
        """The server that answers here, without its /v1; None: this process does."""
        return parse_backend(self.backend)

    def bootstrap_path(self) -> Path | None:
        """The bootstrap file to read: the one named, else the checkout's own, else none."""
        if self.bootstrap_file is not None:
            return self.bootstrap_file
        own = Path(__file__).parent.parent / "bootstrap_peers.json"
        return own if own.exists() else None


def parse_http(value: str) -> HttpAddress | None:
    """HOST:PORT, [IPv6]:PORT or off. Raises ValueError that says what was wanted."""
    if value == "off":
        return None
    host, colon, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not _is_number(port) or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT (as 127.0.0.1:8765, port 0 for any free one) and not off")
    return HttpAddress(host=host, port=int(port))


def parse_backend(value: str) -> str | None:
    """None for transformers, the URL for openai:URL, without /v1 at its end. Raises ValueError with what was wanted."""
    if value == "transformers":
        return None
    wanted = "transformers, or openai:URL as openai:http://127.0.0.1:8000"
    kind, _, url = value.partition(":")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if kind != "openai" or not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"wanted {wanted}")
    if "@" in parts.netloc:
        raise ValueError("a URL is told in logs and status: give the server's key by --backend-key-file, not in it")
    if parts.query or parts.fragment:
        raise ValueError(f"a server's address has no ? and no #; wanted {wanted}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def load_config(
    flags: Mapping[str, object], *, environment: Mapping[str, str] | None = None, file: Path | None = None
) -> NodeConfig:
    """Compose the settings. Raises ConfigError with one sentence for every bad key.

    flags: only those the user gave. environment: the process's when None. file: app_config.json, or None.
    """
    variables = _from_environment(os.environ if environment is None else environment)
    named = variables.pop("config", None)
    if file is None and isinstance(named, str):
        file = Path(named)
    sources: list[Mapping[str, Setting]] = [
        {key: Setting(key, value) for key, value in settings.items()} for settings in (flags, variables)
    ]
    sources.append(_from_file(file) if file is not None else {})
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}  # how whoever gave a setting calls it
    for settings in sources:
        for key, setting in settings.items():
            if key not in merged:
                merged[key], origin[key] = setting.value, setting.key
    try:
        config = NodeConfig(**merged)
    except ValidationError as exc:
        raise ConfigError("; ".join(_sentence(problem, origin) for problem in exc.errors())) from exc
    _check_exposure(config)
    _check_model(config)
    return config


def _from_file(path: Path) -> dict[str, Setting]:
    try:
        settings = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConfigError(f"cannot read the configuration file {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        hint = " (no comma may stand before a closing brace)" if "property name" in str(exc) else ""
        raise ConfigError(f"the configuration file {path} is not JSON: {exc}{hint}") from exc
    if not isinstance(settings, dict):
        raise ConfigError(f"the configuration file {path} holds a {type(settings).__name__}, wanted an object of keys")
    try:
        found = settings_of(settings)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None
    return {name: Setting(f"{path}: {setting.key}", setting.value) for name, setting in found.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in CLIENT_VARIABLES:
            continue
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if key not in NodeConfig.model_fields and key != "config":
            raise ConfigError(f"{variable} is not a setting of the node; unset it, or see `python -m node run --help`")
        settings[key] = _typed(variable, key, text)
    return settings


def _typed(variable: str, key: str, text: str) -> object:
    if key in _LISTS:
        return tuple(part for part in text.split(",") if part)
    if key in _NUMBERS:
        if not _is_number(text):
            raise ConfigError(f"{variable}={_shown.repr(text)} is not a whole number of at most 9 digits")
        return int(text)
    if key in _DECIMALS:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(f"{variable}={_shown.repr(text)} is not a number") from None
    if key in _FLAGS or key == "open":
        if text.lower() not in ("1", "0", "true", "false"):
            raise ConfigError(f"{variable}={text!r} is not true or false")
        return text.lower() in ("1", "true")
    return text


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 9


def _sentence(problem: Any, origin: Mapping[str, str]) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else "?"
    name = origin.get(key, key)
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(NodeConfig.model_fields))
        return f"{name.removesuffix(key)}unknown key {key!r}; the known keys are {known}"
    return f"{name} = {_shown.repr(problem['input'])}: {problem['msg'].removeprefix('Value error, ')}"


def _check_exposure(config: NodeConfig) -> None:
    address = config.http_address()
    if address is not None and address.host not in LOOPBACK_HOSTS and not (config.open or config.api_keys):
        raise ConfigError(
            f"http = {config.http!r} would let anybody who reaches this machine use the node: "
            "add --api-keys to answer only who has a key or signs, --open if anybody is meant, or bind 127.0.0.1"
        )


def _check_model(config: NodeConfig) -> None:
    if config.quantize != "none" and config.device in ("cuda", "mps"):
        raise ConfigError(f"--quantize {config.quantize} is for models on a CPU: leave it out, or choose --device cpu")
    train = config.train if config.training else None
    if train is not None and not config.data:
        raise ConfigError(f"--train {config.train} wants text of yours to train on: add --data FILE or --data FOLDER")
    if config.data and config.train is None:
        raise ConfigError("--data is text to train on: say in which run by --train RUN, or leave it out")
    if config.upstream_url() is not None:
        if config.quantize != "none":
            raise ConfigError(
                f"--quantize {config.quantize} is for weights of this process, and --backend names a server that has "
                "them: leave one of the two out"
            )
        if config.model == "none":
            raise ConfigError(
                "--model none hosts none, and --backend names a server that does: give only one of the two"
            )
        if config.model_type != "auto" or config.max_length is not None:
            raise ConfigError(
                "--model-type and --max-length are for a model of this process, and --backend names a server that "
                "sets its own: leave them out"
            )
        if train is not None:
            raise ConfigError(
                f"--train {train} wants weights of this process, and --backend names a server that has them: "
                "train on a node with a model of its own"
            )
    elif config.backend_key_file is not None:
        raise ConfigError("--backend-key-file is for --backend openai:URL, which is not given")
    if train is not None and config.model == "none":
        raise ConfigError(f"--train {config.train} wants a model, and --model none hosts none")
