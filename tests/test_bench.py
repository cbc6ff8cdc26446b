"""bench/: the form of the results, and a README whose figures are those of bench/results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.harness import Options, Row, quantile, report
from bench.report import BEGIN, END, FIGURES, KEY, README, key_table, newest, number, table, with_figures


def test_a_result_has_the_form_that_others_rely_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "hop.json"
    row = Row(figure="f_ms", value=2.0, unit="ms", better="lower", rival="them", rival_value=4.0)
    report("hop", [row], Options(quick=True, json_path=file))
    document = json.loads(file.read_text())
    assert document["rows"] == [
        {
            "figure": "f_ms",
            "value": 2.0,
            "unit": "ms",
            "better": "lower",
            "rival": "them",
            "rival_value": 4.0,
            "ratio": 0.5,
        }
    ]
    assert {"name", "machine", "versions", "rows"} <= document.keys()
    assert "f_ms" in capsys.readouterr().out


def test_quantile() -> None:
    assert quantile([float(n) for n in range(101)], 0.99) == pytest.approx(99.0)


def test_the_pages_show_the_newest_results() -> None:
    documents, readme, figures = newest(), README.read_text(), FIGURES.read_text()
    assert with_figures(readme, key_table(documents)) == readme, "run python -m bench.report"
    assert with_figures(figures, table(documents)) == figures, "run python -m bench.report"


def test_the_readmes_figures_were_measured() -> None:
    measured = {(document["name"], row["figure"]) for document in newest() for row in document["rows"]}
    assert [each for each in KEY if each[:2] not in measured] == []
    assert key_table([]).count("\n") == 1


def test_numbers_are_readable() -> None:
    assert [number(each) for each in (523_190.5, 1.6138, 0.030941, -12_345.0)] == [
        "523,190",
        "1.614",
        "0.03094",
        "-12,345",
    ]


def test_a_readme_without_the_marks_is_an_error() -> None:
    with pytest.raises(ValueError, match="must hold"):
        with_figures(f"no marks {BEGIN} and half", "rows")
    assert with_figures(f"a{BEGIN}old{END}b", "new") == f"a{BEGIN}\nnew\n{END}b"
