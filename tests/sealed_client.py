"""docs/clients/sealed.py as a module: tests ask as a client does that was written from the docs alone."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.test_house import ROOT


def load() -> ModuleType:
    """The client."""
    spec = importlib.util.spec_from_file_location("sealed_client_of_docs", ROOT / "docs/clients/sealed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
