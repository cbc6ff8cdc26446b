"""`python -m bench.report [--check]`: the README's table of figures, made from bench/results; --check only compares.

Rules: the newest result of each benchmark counts; a figure without a result stands nowhere in the README.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: python -m bench.report -->", "<!-- end of figures -->"


def newest() -> list[dict[str, Any]]:
    """The newest result of each benchmark, by the date in the file."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        document = json.loads(path.read_text())
        known = found.get(document["name"])
        if known is None or document["date"] >= known["date"]:
            found[document["name"]] = document
    return [found[name] for name in sorted(found)]


def table(documents: list[dict[str, Any]]) -> str:
    """Markdown rows of every figure."""
    lines = ["| bench | figure | value | beside it | measured |", "| --- | --- | --- | --- | --- |"]
    for document in documents:
        machine = document["machine"]
        where = f"{document['date']}, {machine['cores']} cores, load {machine['load_1min']:.1f}"
        for row in document["rows"]:
            beside = "" if row["rival"] is None else f"{row['rival']}: {row['rival_value']:.4g}"
            lines.append(
                f"| {document['name']} | {row['figure']} | {row['value']:.4g} {row['unit']} | {beside} | {where} |"
            )
    return "\n".join(lines)


def with_figures(readme: str, rows: str) -> str:
    """The README with the rows between its two marks. Raises ValueError when a mark is missing."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{rows}\n{END}{tail}"


def main() -> None:
    """Write the README's figures, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    readme = README.read_text()
    made = with_figures(readme, table(newest()))
    if chosen.check:
        sys.exit(0 if made == readme else "README.md's figures are not those of bench/results: python -m bench.report")
    README.write_text(made)


if __name__ == "__main__":
    main()
