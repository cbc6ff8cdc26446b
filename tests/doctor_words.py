"""All that the doctor can say of what needs attention, read from its source: `…` stands for what is found at the time.

`python -m tests.doctor_words` prints it as the table of docs/operators/troubleshooting.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = ("node/commands/checks.py", "node/commands/doctor.py")
REACH = "p2p/reach.py"  # its verdicts bring advice of their own
OPEN = "…"


@dataclass(frozen=True, slots=True)
class Words:
    """One line that the doctor may print."""

    check: str
    verdict: str
    found: str
    advice: str


def words() -> list[Words]:
    """In the order of the source."""
    said: list[Words] = []
    reach = _texts(ast.parse((ROOT / REACH).read_text()).body)
    for name in FILES:
        tree = ast.parse((ROOT / name).read_text())
        for function in (each for each in tree.body if isinstance(each, ast.FunctionDef)):
            known = reach | _texts(tree.body) | _texts(ast.walk(function))
            calls = [each for each in ast.walk(function) if isinstance(each, ast.Call)]
            for call in sorted(calls, key=lambda call: call.lineno):
                if isinstance(call.func, ast.Name) and call.func.id in ("look", "bad"):
                    check, found, advice = (_told(given, known) for given in call.args)
                    said.append(Words(check, call.func.id, found, advice))
    return [*said, *_reach()]


def _reach() -> Iterator[Words]:
    tree = ast.parse((ROOT / REACH).read_text())
    known = _texts(tree.body)
    for call in ast.walk(tree):
        for word in call.keywords if isinstance(call, ast.Call) else ():
            if word.arg == "advice":
                yield Words("reachable", "bad", OPEN, _told(word.value, known))


def _texts(lines: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """Names that stand for a text."""
    found: dict[str, ast.expr] = {}
    for line in lines:
        if isinstance(line, ast.Assign):
            for target in line.targets:
                names, values = [target], [line.value]
                if isinstance(target, ast.Tuple) and isinstance(line.value, ast.Tuple):
                    names, values = list(target.elts), list(line.value.elts)
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name) and isinstance(value, ast.Constant | ast.JoinedStr):
                        found[name.id] = value
    return found


def _told(value: ast.expr, known: dict[str, ast.expr]) -> str:
    match value:
        case ast.Constant(value=text) if isinstance(text, str):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_told(part, known) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) if name in known and name.isupper():
            return _told(known[name], known)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _told(left, known) + _told(right, known)
        case ast.Name(id=name) if name in known:
            return _told(known[name], known)
    return OPEN


def table() -> str:
    """For people."""
    lines = ["| check | what it says | what to do |", "| --- | --- | --- |"]
    lines += [f"| {each.check} | {each.found} | {each.advice} |" for each in words()]
    return "\n".join(dict.fromkeys(lines))


if __name__ == "__main__":
    print(table())
