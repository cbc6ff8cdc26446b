"""What every benchmark shares: the machine's name, the table on the screen, the JSON file of INTERFACES.md.

Rules: figures are ratios or medians of one run on one machine; names are those of MEASURE.md and are kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

ANEW = {"cache-control": "no-store"}  # headers of a request whose answer is to be made, whoever asked it before
PACKAGES = ("torch", "transformers", "libp2p", "trio", "msgpack", "hypercorn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. rival: whose number stands beside it, if any; ratio: value over rival_value."""

    figure: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    rival: str | None = None
    rival_value: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value over the rival's; None without one."""
        return None if not self.rival_value else self.value / self.rival_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every benchmark takes from its command line."""

    quick: bool
    json_path: Path | None


def options(description: str | None) -> Options:
    """Parse `[--quick] [--json FILE]`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    chosen = parser.parse_args()
    return Options(quick=chosen.quick, json_path=chosen.json)


def report(name: str, rows: Sequence[Row], chosen: Options) -> None:
    """Print the table and write the JSON."""
    table = Table(title=f"bench {name}")
    for column in ("figure", "value", "unit", "better", "rival", "rival value", "ratio"):
        table.add_column(
            column, justify="right" if column in ("value", "rival value", "ratio") else "left", no_wrap=True
        )
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        rival_value = "" if row.rival_value is None else f"{row.rival_value:.4g}"
        table.add_row(row.figure, f"{row.value:.4g}", row.unit, row.better, row.rival or "", rival_value, ratio)
    Console(width=150).print(table)
    if chosen.json_path is not None:
        document = {
            "name": name,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
        }
        chosen.json_path.parent.mkdir(parents=True, exist_ok=True)
        chosen.json_path.write_text(json.dumps(document, indent=2) + "\n")


def machine() -> dict[str, object]:
    """What the figures were measured on, and how busy it was."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_1min": busy,
    }


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]
