"""A model's chat template: rendered in a sandbox, its size, its work and its output bounded.

Rules: a template is the model's, so an attacker's. It may not reach attributes (jinja2's sandbox), it may call only
what real templates call, and each turn of a loop, each call and each character it makes is charged to a budget, so
that its time and memory have an end whatever it does. Nothing random; the same messages give the same prompt.
Source: transformers `utils/chat_template_utils.py` for what templates may use; SECURITY.md F14.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, NoReturn, cast

from jinja2 import TemplateError, TemplateRuntimeError, nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from model.errors import FOREIGN, BadInput, BadModel, first_line

TEMPLATE_CHARS_MAX = 64 << 10  # the longest in use have some 20,000
RENDERED_CHARS_MAX = 1 << 20
BUDGET = 400_000  # loop turns, calls, and values made or read / 16
INTEGER_MAX = 10_000  # as an argument: widths, counts
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim", "unique", "upper",
)  # fmt: skip
LISTING = ("join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr", "sort", "sum", "unique")
TESTING = ("reject", "rejectattr", "select", "selectattr")  # with an argument of the test for each item
WRITING = ("capitalize", "e", "escape", "indent", "join", "lower", "replace", "string", "title", "trim", "upper")
STRING_METHODS = (
    "capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
    "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
)  # fmt: skip
COMPARING = (
    "eq",
    "==",
    "equalto",
    "ne",
    "!=",
    "in",
    "lt",
    "<",
    "lessthan",
    "le",
    "<=",
    "gt",
    ">",
    "greaterthan",
    "ge",
    ">=",
)
WIDE_FORMAT = re.compile(r"\d{4,}|\{[^}]*\{|\*")  # a width of thousands, or one taken from an argument


Turn = tuple[str, str] | Mapping[str, Any]  # (role, content), or a message with all that it has


class TakesNoTools(BadInput):
    """The template says the same whether it is given tools or none: the model would never hear of them."""


def row_of(turn: Turn) -> dict[str, Any]:
    """A message as templates take it."""
    return {"role": turn[0], "content": turn[1]} if isinstance(turn, tuple) else dict(turn)


class ChatTemplate:
    """One compiled template. One thread at a time."""

    def __init__(self, source: str, special_tokens: dict[str, object]) -> None:
        """Raises BadModel for a template that is too long or does not compile."""
        if len(source) > TEMPLATE_CHARS_MAX:
            raise BadModel(f"the chat template has {len(source):,} characters, over {TEMPLATE_CHARS_MAX:,}")
        self._environment = _Environment()
        try:
            self._template = self._environment.compile_bounded(source)
        except (TemplateError, *FOREIGN) as exc:
            raise BadModel(f"the chat template does not compile ({first_line(exc)})") from exc
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt text of a chat. Raises BadInput, also for a template that does too much, and TakesNoTools."""
        rows = [row_of(turn) for turn in messages]
        text = self._rendered(rows, tools or None)
        if tools and text == self._rendered(rows, None):
            raise TakesNoTools("its chat template does not show them", param="tools")
        return text

    def _rendered(self, rows: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """One rendering, with a budget of its own."""
        self._environment.left = BUDGET
        pieces: list[str] = []
        chars = 0
        try:
            for piece in self._template.generate(
                messages=rows, tools=tools, documents=None, add_generation_prompt=True, **self._special_tokens
            ):
                chars += len(piece)
                if chars > RENDERED_CHARS_MAX:
                    raise TemplateRuntimeError(f"the prompt has over {RENDERED_CHARS_MAX:,} characters")
                pieces.append(piece)
        except (TemplateError, *FOREIGN) as exc:
            raise BadInput(
                f"the model's chat template refuses these messages ({first_line(exc)})", param="messages"
            ) from exc
        return "".join(pieces)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks the assistant's text for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(NodeTransformer):
    """Puts a charge into every loop and macro, and a check around what joins or nests values."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - jinja2's own interface
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_turns")
        node.body.insert(0, _tick(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, _tick(node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:  # noqa: N802
        self.generic_visit(node)  # the right side is what costs: equality stops at the shorter, `in` reads the right
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "_weighed")
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Test:  # noqa: N802
        self.generic_visit(node)
        if node.name in COMPARING:
            node.args = [_filtered(arg, "_weighed") for arg in node.args]
            for keyword in node.kwargs:
                keyword.value = _filtered(keyword.value, "_weighed")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, "_sliced")
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_weighed") if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_weighed") if node.items and node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "_weighed") if node.items else node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", node), name, [], [], None, None, lineno=node.lineno)


def _tick(node: nodes.Node) -> nodes.ExprStmt:
    return nodes.ExprStmt(_filtered(nodes.Const(0, lineno=node.lineno), "_tick"), lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget: `left` falls with all that a rendering does."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._out,
            optimized=False,  # constants are folded at compile time, where nothing is charged
        )
        self.left = BUDGET
        self.filters = {name: self._charged(name, f) for name, f in self.filters.items() if name in FILTERS}
        self.filters["tojson"] = self._to_json
        self.filters.update(
            _turns=self._turns, _tick=self._tick, _concat=self._concat, _weighed=self._weighed, _sliced=self._sliced
        )
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def compile_bounded(self, source: str) -> Template:
        """Source -> template with the charges in it. Raises what jinja2 raises."""
        tree = self.parse(source)
        code = self.compile(_Bounded().visit(tree))
        return Template.from_code(self, code, self.globals)

    def charge(self, amount: int) -> None:
        """Takes from the budget. Raises SecurityError when it is used up."""
        self.left -= amount
        if self.left < 0:
            raise SecurityError("the template does too much work")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic on numbers, and joining of texts and lists within bounds."""
        match operator:
            case "**":
                raise SecurityError("the template may not use powers")
            case "*" if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
                many, times = (left, right) if isinstance(right, int) else (right, left)
                self._made(len(many) * max(0, int(times)))
            case "*":
                if abs(left) > 1 << 64 or abs(right) > 1 << 64:
                    raise SecurityError("the template makes too large a number")
            case "+" if isinstance(left, Sized) and isinstance(right, Sized):
                self._made(len(left) + len(right))
            case "%" if isinstance(left, str):
                self._check_format(left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in the template: of a macro, of a function above, or of a text's method."""
        self._check_arguments((*args, *kwargs.values()))
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps str.format
        if isinstance(owner, str):
            name = obj.__name__
            if name not in STRING_METHODS:
                raise SecurityError(f"the template may not call {name[:50]!r} of a text")
            self._check_text(name, owner, args, kwargs)
        elif isinstance(obj, type):  # dict(), namespace()
            self._weighed((*args, *kwargs.values()))
        result = super().call(context, obj, *args, **kwargs)
        self._made(len(result) if isinstance(result, str | list | tuple) else 0)
        return result

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for its input and its output."""

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            at = 1 if hasattr(function, "jinja_pass_arg") else 0
            value, rest = args[at], args[at + 1 :]
            self._check_arguments((*rest, *kwargs.values()))
            if isinstance(value, str):
                self._check_text(name, value, rest, kwargs)
            elif name in LISTING:
                value = self._turns(value)
            if name in TESTING:
                self.charge(len(value) * (1 + _weight(rest) // 16))
            if name in WRITING:
                self._weighed(value)
            if name == "join" and rest:
                self._made(len(str(rest[0])) * len(value))
            result = function(*args[:at], value, *rest, **kwargs)
            self._made(len(result) if isinstance(result, str | list | tuple) else 0)
            return result

        return charged

    def _made(self, size: int) -> None:
        """Pays for a text or list of this size, before it is made where that can be known."""
        if size > RENDERED_CHARS_MAX:
            raise SecurityError(f"the template makes a value of over {RENDERED_CHARS_MAX:,} characters or items")
        self.charge(1 + size // 16)

    def _check_arguments(self, args: Iterable[Any]) -> None:
        if any(isinstance(arg, int | float) and abs(arg) > INTEGER_MAX for arg in args):
            raise SecurityError(f"the template passes a number over {INTEGER_MAX:,} to a function")

    def _check_text(self, name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What could make a text much longer than it is."""
        self.charge(1 + len(text) // 16)
        match name, (*args, *kwargs.values()):
            case "replace", (str(old), str(new), *_):
                self._made(len(text) + text.count(old) * len(new))
            case "join", (items,):
                self._weighed(items)
                self._made(len(text) * len(items) if isinstance(items, Sized) else RENDERED_CHARS_MAX + 1)
            case "indent", (width, *_):
                self._made((text.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
            case "format", values:
                self._check_format(text, values)

    def _check_format(self, text: str, values: Any) -> None:
        if WIDE_FORMAT.search(text):
            raise SecurityError("the template formats with a width that is too large or not fixed")
        places = text.count("%") + text.count("{")
        self._made(len(text) + places * (1_000 + _weight(values)))

    def _turns(self, value: Any) -> Any:
        if isinstance(value, Undefined):
            return value
        items = list(itertools.islice(iter(value), self.left + 1))
        self.charge(len(items))
        return items

    def _tick(self, value: Any) -> Any:
        self.charge(1)
        return value

    def _concat(self, values: list[Any]) -> str:
        self._weighed(values)
        return "".join(str(value) for value in values)

    def _weighed(self, value: Any) -> Any:
        """Pays for what is about to be read, compared, written or nested in another value."""
        self._made(_weight(value))
        return value

    def _sliced(self, value: Any) -> Any:
        self._made(len(value) if isinstance(value, Sized) else 0)
        return value

    def _out(self, value: Any) -> Any:
        return value if isinstance(value, str) else self._weighed(value)

    def _to_json(self, value: Any, indent: int | None = None, **options: Any) -> str:
        """JSON without HTML's escapes, as transformers has it."""
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
            raise SecurityError("the template asks for JSON with an indent over 16")
        self._made(_weight(value) * (1 + (indent or 0)))
        allowed = {key: options[key] for key in ("separators", "sort_keys", "ensure_ascii") if key in options}
        return json.dumps(value, indent=indent, **{"ensure_ascii": False, **allowed})


def _weight(value: Any) -> int:
    """Characters and items in a value, nested ones each time that they occur; counted to just over the bound."""
    stack, total = [value], 0
    while stack and total <= RENDERED_CHARS_MAX:
        item = stack.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            total += 2 * len(item)
            stack.extend((*item.keys(), *item.values()))
        elif isinstance(item, list | tuple | set | frozenset):
            total += len(item)
            stack.extend(item)
        elif isinstance(item, int):
            total += 1 + item.bit_length() // 3  # a client's JSON has numbers of thousands of digits
        else:
            total += 1
    return total


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message)[:300])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise SecurityError("the template asks for a date in over 100 characters")
    return datetime.datetime.now().strftime(pattern)
