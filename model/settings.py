"""The settings of a model as an operator names them: the `model` section of app_config.json.

Rules: core. Each key is read; one that is not known, badly typed or out of its range is a BadSetting that names it;
null means absent, and a key that begins with // is a comment. A whole app_config.json may be given: its other sections
are the node's, and so is what NODE_KEYS names.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields

from model.config import DEVICES, DTYPES, MODEL_TYPES, QUANTIZATIONS, RuntimeConfig
from model.errors import BadSetting, NotLoaded

MAX_TOKENS_DEFAULT = 256
SECTION = "model"
SWITCH = "app.enable.model"
NODE_KEYS = frozenset({"cache_mb"})  # of the section: what a node keeps of answers
_WORDS = {"model_type": MODEL_TYPES, "device": DEVICES, "dtype": DTYPES, "quantize": QUANTIZATIONS}
_COUNTS = {  # the least
    "max_length": 0, "max_tokens": 1, "threads": 0, "max_batch": 1, "kv_cache_mb": 1,
}  # fmt: skip
_TEMPERATURE_MAX = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """model_path: a folder, a hub name, or `default` for the embedded model. max_tokens and temperature: of a request
    that names none. max_length and threads 0: what the model reads, and torch's choice."""

    model_path: str = "default"
    model_type: str = "auto"
    max_length: int = 0
    max_tokens: int = MAX_TOKENS_DEFAULT
    temperature: float = 1.0
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    embedding_model: str = ""
    threads: int = 0
    max_batch: int = 16
    kv_cache_mb: int = 256

    def __post_init__(self) -> None:
        """Raises BadSetting."""
        for name in ("model_path", "embedding_model"):
            if not isinstance(getattr(self, name), str):
                raise _bad(name, getattr(self, name), "a folder or a name, as text")
        if not self.model_path:
            raise _bad("model_path", self.model_path, "a folder or a name")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise _bad(name, getattr(self, name), f"one of {', '.join(words)}")
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise _bad(name, value, f"a whole number from {least}")
        given = self.temperature
        if type(given) not in (int, float) or not 0.0 <= given <= _TEMPERATURE_MAX:
            raise _bad("temperature", given, f"a number from 0 to {_TEMPERATURE_MAX:g}")

    def runtime(self) -> RuntimeConfig:
        """How the model is run."""
        return RuntimeConfig(
            device=self.device,
            dtype=self.dtype,
            quantize=self.quantize,
            threads=self.threads,
            embedding_name=self.embedding_model,
            slots=self.max_batch,
            kv_cache_mb=self.kv_cache_mb,
            model_type=self.model_type,
            max_length=self.max_length,
        )


def settings_of(config: ModelSettings | Mapping[str, object] | None) -> ModelSettings:
    """Of the `model` section, or of a whole app_config.json, nested or dotted; None: the embedded model.

    Raises BadSetting, and NotLoaded when app.enable.model is false.
    """
    if isinstance(config, ModelSettings):
        return config
    given = {} if config is None else dict(config)
    if any(key in given or any(name.startswith(f"{key}.") for name in given) for key in ("app", SECTION)):
        if _below(_below(given, "app"), "enable").get(SECTION, True) is False:
            raise NotLoaded(f"{SWITCH} is false: there is no model to initialize", param=SWITCH)
        given = _below(given, SECTION)
        given = {name: value for name, value in given.items() if name not in NODE_KEYS}
    given = {name: value for name, value in given.items() if value is not None and not name.startswith("//")}
    known = [field.name for field in fields(ModelSettings)]
    for name in given:
        if name not in known:
            raise BadSetting(f"unknown key {str(name)[:80]!r}; the keys of a model are {', '.join(known)}", param=name)
    return ModelSettings(**given)  # type: ignore[arg-type]  # __post_init__ looks at each


def _below(given: Mapping[str, object], section: str) -> dict[str, object]:
    """The keys of a section, given as an object, by dotted names, or by both."""
    inner = given.get(section)
    if inner is not None and not isinstance(inner, Mapping):
        raise _bad(section, inner, "an object of keys")
    dotted = {
        name.removeprefix(f"{section}."): value for name, value in given.items() if name.startswith(f"{section}.")
    }
    return {**dotted, **(inner or {})}


def _bad(name: str, value: object, wanted: str) -> BadSetting:
    return BadSetting(f"{name} = {reprlib.repr(value)[:80]}: wanted {wanted}", param=name)
