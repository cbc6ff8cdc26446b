"""`python -m bench.report [--check]`: docs/FIGURES.md and the README's few figures, made from bench/results.

Rules: the newest result of each benchmark counts; a figure without a result stands nowhere. All are in docs/FIGURES.md,
those of KEY in the README too, in words. --check only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
README, FIGURES = ROOT / "README.md", ROOT / "docs" / "FIGURES.md"
# benchmark, figure, and what it says; in this order in the README
KEY = (
    ("real_swarm", "asked", "requests to 10 processes, one of which is killed every 5 s, with cut and slow cables"),
    ("real_swarm", "unresolved", "of them without an end: neither a result nor an error"),
    ("real_swarm", "reroute_p95_s", "silence of an answer whose server was killed, p95"),
    ("hop", "first_byte_added_p50_ms", "what another peer's answer takes longer to its first byte"),
    ("serving", "e2e_b16_int8_ratio", "16 answers at once, int8, over transformers' generate in bf16"),
    ("serving", "e2e_b1_ratio", "one answer, over the same"),
    ("serving", "served_load_int8_ratio", "a served load, int8, over transformers' continuous batching in bf16"),
    ("serving", "served_load_int8_ttft_ratio", "its time to the first token, p95, over the same"),
    ("serving", "llamacpp_b16_q8_0_ratio", "16 answers at once, int8, over llama.cpp's q8_0"),
    ("serving", "llamacpp_b1_q8_0_ratio", "one answer, over the same"),
    ("serving", "prefix_reuse_ratio", "first token sooner with a 512-token prefix that is known"),
    ("averaging", "sparse_n4_bytes", "bytes a peer sends in a round of 25M parameters"),
    ("averaging", "sparse_n4_cpu_s", "CPU seconds of a peer for it"),
    ("averaging", "group_forms_s", "until a group of four has formed"),
    ("learning", "loss_sparse_k64_h5", "eight workers' held-out loss, sparse updates"),
    ("poison", "sign_flip_x10_loss_ratio", "loss with a fifth of the members attacking, over a clean run's"),
    ("pipe", "direct_mb_per_cpu_s", "bulk between two peers"),
    ("flood", "gossip_attacker_cut_after", "until a flood of 10,000 signed messages a second is cut off"),
    ("limits", "flood_refused", "of 1,000 requests a second on a key of 5 a second, refused"),
    ("limits", "flood_answer_p50", "until such a refusal is there, median"),
    ("crowd_10000", "bytes_per_s_n10000", "gossip in a simulated network of 10,000"),
    ("idle", "ready_s", "from start to ready, with the model that comes with the node"),
)
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


def number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def table(documents: list[dict[str, Any]]) -> str:
    """Markdown rows of every figure."""
    lines = ["| bench | figure | value | beside it | measured |", "| --- | --- | --- | --- | --- |"]
    for document in documents:
        machine = document["machine"]
        where = f"{document['date']}, {machine['cores']} cores, load {machine['load_1min']:.1f}"
        for row in document["rows"]:
            beside = "" if row["rival"] is None else f"{row['rival']}: {number(row['rival_value'])}"
            lines.append(
                f"| {document['name']} | {row['figure']} | {number(row['value'])} {row['unit']} | {beside} | {where} |"
            )
    return "\n".join(lines)


def key_table(documents: list[dict[str, Any]]) -> str:
    """Markdown rows of KEY, of those that were measured."""
    rows = {(document["name"], row["figure"]): (document, row) for document in documents for row in document["rows"]}
    lines = ["| what | value | beside it | measured |", "| --- | --- | --- | --- |"]
    for name, figure, told in KEY:
        if (name, figure) in rows:
            document, row = rows[name, figure]
            beside = "" if row["rival"] is None else f"{row['rival']}: {number(row['rival_value'])}"
            value = f"{number(row['value'])} {row['unit']}"
            lines.append(f"| {told} | {value} | {beside} | `bench.{name.split('_1')[0]}`, {document['date']} |")
    return "\n".join(lines)


def with_figures(readme: str, rows: str) -> str:
    """A page with the rows between its two marks. Raises ValueError when a mark is missing."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n{rows}\n{END}{tail}"


def main() -> None:
    """Write both pages' figures, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    documents = newest()
    for page, rows in ((README, key_table(documents)), (FIGURES, table(documents))):
        text = page.read_text()
        made = with_figures(text, rows)
        if chosen.check and made != text:
            sys.exit(f"{page.name}'s figures are not those of bench/results: python -m bench.report")
        page.write_text(made)


if __name__ == "__main__":
    main()
