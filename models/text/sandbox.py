"""Sandbox for untrusted chat templates: no access to Python, bounded work per rendering.

Jinja's sandbox blocks access to the interpreter, but does not bound work. Here every loop iteration, call, string and
collection is charged to a budget, before or while it is made. A rendering over budget or time is aborted.
"""

import json
import re
import string
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

STEP_COST = 50  # of a loop iteration or a call; the unit is one character of output
MAX_WIDTH, MAX_INDENT = 10_000, 100  # in characters or items; MAX_INDENT also for JSON separators
MAX_INT_BITS = 100_000
TIME_LIMIT_S = 10.0  # per rendering; real ones take milliseconds
FILTERS = (
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max",
    "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort",
    "string", "sum", "title", "trim", "unique", "upper", "wordcount",
)  # fmt: skip

# Filters and methods whose second argument sets the result's size: its keyword, and its limit.
SIZE_ARGS = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), ("width", MAX_WIDTH)), "indent": ("width", MAX_INDENT),
    "batch": ("linecount", MAX_WIDTH), "slice": ("slices", MAX_WIDTH), "to_bytes": ("length", MAX_WIDTH),
    "round": ("precision", MAX_WIDTH),
}  # fmt: skip
# str methods whose work cannot be bounded
FORBIDDEN = ("translate", "expandtabs", "format_map", "striptags")
RENDERING = ("tojson", "string", "join", "format")  # these write whole collections
QUADRATIC = ("replace", "join", "rfind", "rindex", "rpartition", "rsplit")  # work: product of two sizes
JINJA = (jinja2.Environment, nodes.EvalContext, Context)  # some filters take one before the value
LISTS: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
SIZED: Any = (*LISTS, str, bytes, dict, range)
UNICODE_ESCAPE = re.compile(r"\\(?:u[0-9a-f]{4}|.)")  # in JSON or a repr
WIDE = re.compile(r"\d{3}|[*{(]")  # a width or precision of three digits, or from an argument
PERCENT = re.compile(r"%(?:\([^()]*\))?([^a-zA-Z%]*)[a-zA-Z%]?")  # flags, width and precision


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`."""


class BudgetExceeded(jinja2.TemplateError):
    """Over budget, or over the limit of a single operation."""


class Sandbox(ImmutableSandboxedEnvironment):
    """A Jinja environment with the tags, filters, globals and white space of transformers.

    Not thread-safe: `start` sets the budget of the next rendering.
    """

    intercepted_binops = frozenset(["+", "-", "*", "**", "/", "//", "%"])

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._charged)
        self.start(0)
        filters = {**{name: self.filters[name] for name in FILTERS}, "tojson": self._tojson, "format": self._format}
        self.filters = {name: self._metered(name, function) for name, function in filters.items()}
        known = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals = {**known, "raise_exception": refuse, "strftime_now": strftime_now}

    def start(self, budget: int, sentinels: str = "") -> None:
        """Sets the budget of the next rendering, in characters. JSON output keeps `sentinels` unescaped."""
        self.budget, self.deadline, self.sentinels = budget, time.monotonic() + TIME_LIMIT_S, sentinels

    def charge(self, cost: int) -> None:
        """Raises BudgetExceeded."""
        self.budget -= cost
        if self.budget < 0 or time.monotonic() > self.deadline:
            raise BudgetExceeded("it does more work than a conversation needs")

    def compiled(self, source: str) -> jinja2.Template:
        """A template that charges for loops, macros, `~`, lists, tuples, dicts and slices."""
        tree = self.parse(source)
        step = nodes.ExprStmt(_hook("charge", [nodes.Const(STEP_COST)]))
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, step)  # type: ignore[attr-defined]
        _charge_literals(tree)
        return self.from_string(tree)

    def concatenate(self, *parts: Any) -> str:
        """`a ~ b`."""
        return "".join(str(self._charged(p)) for p in parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.charge(self._cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template. The parameter names can't collide with keyword arguments."""
        if __obj in (__self.charge, __self.concatenate, __self._charged):
            return __obj(*args)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes) and name in FORBIDDEN:
            raise BudgetExceeded(f"it calls {name}, which no template needs")
        args = __self._materialized(name, args)
        __self._charge_call(name, (owner, *args), kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else __self._charged(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`"{:5}".format(x)`."""
        if (wrapped := super().wrap_str_format(value)) is None:
            return None
        text: str = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_widths([spec for _, _, spec, _ in string.Formatter().parse(text) if spec])
            self.charge(text.count("{") * self._total_size([args, kwargs]))
            return wrapped(*args, **kwargs)

        return formatted

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """`"%s" | format(x)`, which is `"%s" % x`."""
        text, values = value if isinstance(value, str) else str(value), kwargs or args
        self.charge(self._cost("%", text, values))
        return text % values

    def _tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """JSON without HTML escapes, as in transformers."""
        if self._total_size([indent, separators]) > MAX_INDENT or (isinstance(indent, int) and indent > MAX_INDENT):
            raise BudgetExceeded("it writes JSON too widely")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        text = encoder.encode(value) if indent is None else "".join(map(self._charged, encoder.iterencode(value)))
        escaped = {f"\\u{ord(c):04x}": c for c in self.sentinels} if ensure_ascii else {}
        return UNICODE_ESCAPE.sub(lambda m: escaped.get(m[0], m[0]), text) if escaped else text

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps Jinja's pass_context and pass_environment attributes
        def metered(*args: Any, **kwargs: Any) -> Any:
            args = self._materialized(name, args)
            self._charge_call(name, args[isinstance(args[0], JINJA) :], kwargs)
            return self._charged(function(*args, **kwargs))

        return metered

    def _materialized(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Iterators as lists for RENDERING, which needs their size."""
        if name not in RENDERING:
            return args
        return tuple(self._charged(list(a)) if isinstance(a, Iterator | range) else a for a in args)

    def _charge_call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Charges a call before it runs. The first argument is the value."""
        values = [*args, *kwargs.values()]
        sizes = [self._total_size(v) if name in RENDERING else _size(v) for v in values]
        self.charge(STEP_COST + sum(sizes))
        if name in QUADRATIC and len(sizes) > 1:
            longest = sorted(sizes)[-2:]
            self.charge(longest[0] * longest[1])
        if name == "sum" and any(isinstance(v, list | tuple) for v in values[1:]):
            raise BudgetExceeded("it adds up lists")
        if name in SIZE_ARGS:
            keyword, largest = SIZE_ARGS[name]
            size = kwargs.get(keyword, args[1] if len(args) > 1 else 0)
            size = abs(size if isinstance(size, int) else _size(size))
            if size > largest:
                raise BudgetExceeded(f"it gives {name} a size over {largest}")
            if name == "indent" and isinstance(args[0], str):
                self.charge(len(args[0].splitlines()) * size)

    def _charged(self, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > MAX_INT_BITS:
            raise BudgetExceeded("it makes a number that is too large")
        self.charge(self._total_size(value))
        return value

    def _cost(self, operator: str, left: Any, right: Any) -> int:
        """The size of an operator's result."""
        if isinstance(left, int) and isinstance(right, int):
            return self._int_cost(operator, left, right)
        if operator == "**":
            return STEP_COST
        if operator == "*":
            value, count = (right, left) if isinstance(left, int) else (left, right)
            return self._total_size(value) * max(count, 0) if isinstance(count, int) else 1
        if operator == "%" and isinstance(left, str | bytes):
            text = left if isinstance(left, str) else left.decode("latin-1")
            _check_widths(PERCENT.findall(text))
            return len(text) + (1 + text.count("%(")) * self._total_size(right)
        return self._total_size(left) + self._total_size(right)

    def _int_cost(self, operator: str, left: int, right: int) -> int:
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > 2 * MAX_INT_BITS or (bits > MAX_INT_BITS and operator in ("*", "**")):
            raise BudgetExceeded("it makes a number that is too large")
        return STEP_COST + bits // 3

    def _total_size(self, value: Any) -> int:
        """Approximate characters of the written value; counting stops at the budget."""
        total, stack = 0, [value]
        while stack and total <= self.budget:
            v = stack.pop()
            total += _size(v)
            if isinstance(v, dict):
                stack += [*v.keys(), *v.values()]
            elif isinstance(v, LISTS):
                stack += v
            elif isinstance(v, Namespace):  # opaque: never written out
                total += self.budget + 1
        return total


class Generation(Extension):
    """{% generation %} marks the assistant's text for training; ignored here."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def strftime_now(format: str) -> str:
    """The local time."""
    if len(format) > 200:
        raise BudgetExceeded("it asks for a date that is too wide")
    _check_widths(PERCENT.findall(format))
    return datetime.now().strftime(format)


def refuse(message: str) -> None:
    raise TemplateRefusal(str(message))


def _check_widths(specs: Sequence[str]) -> None:
    """Raises BudgetExceeded for a format with a large or variable width or precision."""
    if any(map(WIDE.search, specs)):
        raise BudgetExceeded("it formats to a width that is too large")


def _size(value: Any) -> int:
    """Characters of a string, approximate digits of an int, items of a collection, else 1."""
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    return len(value) if isinstance(value, SIZED) else 1


def _hook(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of an environment method; template variables can't shadow it."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _charge_literals(tree: nodes.Node) -> None:
    for node in [tree, *tree.find_all(nodes.Node)]:
        for name, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, name, _charged_node(value))
            elif isinstance(value, list):
                value[:] = map(_charged_node, value)


def _charged_node(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _hook("concatenate", node.nodes)
    literal = isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    return _hook("_charged", [node]) if literal or sliced else node
