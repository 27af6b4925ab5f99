"""Where chat templates run: no access to Python, and a bound on the work that one rendering may do.

Jinja's sandbox keeps a template from the interpreter's insides but bounds no work. Here every turn of a loop, every
call, and every text and list that is made costs something, and is paid for before or while it is made. A rendering
that spends too much, or takes too long, is ended. So no single operation is large, and their number is bounded.
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

STEP = 50  # cost of a loop's turn or a call, in characters of text made
WIDEST, MARGIN = 10_000, 100  # characters or items; of an indentation, and of separators in JSON
BITS = 100_000  # of a whole number
SECONDS = 10.0  # of one rendering; a real one takes milliseconds
FILTERS = (
    "abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first",
    "float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max",
    "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort",
    "string", "sum", "title", "trim", "unique", "upper", "wordcount",
)  # fmt: skip

# Filters and methods with a number that sets the size of the result: its keyword, and how large it may be. It is
# also their second argument, after the value. Numbers that are given to others are data.
SIZES = {
    "batch": ("linecount", WIDEST),
    "center": ("width", WIDEST),
    "indent": ("width", MARGIN),
    "ljust": ("width", WIDEST),
    "rjust": ("width", WIDEST),
    "round": ("precision", WIDEST),  # digits of a power of ten
    "slice": ("slices", WIDEST),
    "to_bytes": ("length", WIDEST),
    "zfill": ("width", WIDEST),
}
# Methods of text whose result or work can be larger than any bound on it
BARRED = ("translate", "expandtabs", "format_map", "striptags")
RENDERING = ("tojson", "string", "join", "format")  # these write out whole collections
PRODUCTS = ("replace", "join", "rfind", "rindex", "rpartition", "rsplit")  # their work grows like a product
JINJA = (jinja2.Environment, nodes.EvalContext, Context)  # what some filters want first, before the value
LISTS: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
SIZED: Any = (*LISTS, str, bytes, dict, range)
ESCAPE = re.compile(r"\\(?:u[0-9a-f]{4}|.)")  # in JSON
WIDE = re.compile(r"\d{3}|[*{(]")  # a width or precision of three digits, or one that is given as a value
PERCENT = re.compile(r"%(?:\([^()]*\))?([^a-zA-Z%]*)[a-zA-Z%]?")  # flags, width and precision of a conversion


class Refused(jinja2.TemplateError):
    """The template itself refuses the messages, through `raise_exception`."""


class Exhausted(jinja2.TemplateError):
    """The template does more work than any conversation needs."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and runs templates as transformers does: the same tags, filters, globals and white space.

    Not for several threads at once: `allow` says what the rendering that follows may spend.
    """

    intercepted_binops = frozenset(["+", "-", "*", "**", "/", "//", "%"])

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._measured)
        self.marks = ""
        self.allow(0)
        filters = {**{name: self.filters[name] for name in FILTERS}, "tojson": self._tojson, "format": self._format}
        self.filters = {name: self._charged(name, function) for name, function in filters.items()}
        known = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals = {**known, "raise_exception": refuse, "strftime_now": strftime_now}

    def allow(self, budget: int, marks: str = "") -> None:
        """Lets the next rendering spend so much, in characters made, and SECONDS. JSON leaves the marks as they are."""
        self.budget, self.deadline, self.marks = budget, time.monotonic() + SECONDS, marks

    def spend(self, cost: int) -> None:
        """Raises Exhausted when nothing is left."""
        self.budget -= cost
        if self.budget < 0 or time.monotonic() > self.deadline:
            raise Exhausted("it does more work than a conversation needs")

    def compiled(self, source: str) -> jinja2.Template:
        """A template whose loops and macros, `~`, lists, tuples, dicts and slices are paid for."""
        tree = self.parse(source)
        turn = nodes.ExprStmt(_hook("spend", [nodes.Const(STEP)]))
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            node.body.insert(0, turn)  # type: ignore[attr-defined]
        _pay_for_literals(tree)
        return self.from_string(tree)

    def concatenate(self, *parts: Any) -> str:
        """`a ~ b`."""
        return "".join(str(self._measured(p)) for p in parts)

    def made(self, value: Any) -> Any:
        """A list, tuple or dict that the template writes, or a slice."""
        return self._measured(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend(self._cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template. The names leave all others to the template's keyword arguments."""
        if __obj in (__self.spend, __self.concatenate, __self.made):
            return __obj(*args)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes) and name in BARRED:
            raise Exhausted(f"it calls {name}, which no template needs")
        args = __self._listed(name, args)
        __self._prepare(name, (owner, *args), kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(result, Namespace) else __self._measured(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`"{:5}".format(x)`, whose fields may have a width."""
        if (wrapped := super().wrap_str_format(value)) is None:
            return None
        text: str = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            specs = [spec for _, _, spec, _ in string.Formatter().parse(text) if spec]
            _require_narrow(specs)
            self.spend(text.count("{") * self._weight([args, kwargs]))
            return wrapped(*args, **kwargs)

        return formatted

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """`"%s" | format(x)`, which is `"%s" % x`."""
        text, values = value if isinstance(value, str) else str(value), kwargs or args
        self.spend(self._cost("%", text, values))
        return text % values

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON that is not escaped for HTML, as transformers has it."""
        if self._weight([indent, separators]) > MARGIN or (isinstance(indent, int) and indent > MARGIN):
            raise Exhausted("it writes JSON too widely")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        text = encoder.encode(value) if indent is None else "".join(map(self._measured, encoder.iterencode(value)))
        escaped = {f"\\u{ord(mark):04x}": mark for mark in self.marks} if ensure_ascii else {}
        return ESCAPE.sub(lambda found: escaped.get(found[0], found[0]), text) if escaped else text

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # Jinja's mark that it wants the context or environment first comes along
        def charged(*args: Any, **kwargs: Any) -> Any:
            args = self._listed(name, args)
            self._prepare(name, args[isinstance(args[0], JINJA) :], kwargs)
            return self._measured(function(*args, **kwargs))

        return charged

    def _listed(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """With what is yet to be generated as lists, where its size matters."""
        if name not in RENDERING:
            return args
        return tuple(self._measured(list(a)) if isinstance(a, Iterator | range) else a for a in args)

    def _prepare(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pays for what is about to happen to the first argument."""
        values = [*args, *kwargs.values()]
        sizes = [self._weight(v) if name in RENDERING else _size(v) for v in values]
        self.spend(STEP + sum(sizes))
        if name in PRODUCTS and len(sizes) > 1:
            longest = sorted(sizes)[-2:]
            self.spend(longest[0] * longest[1])
        if name == "sum" and any(isinstance(v, list | tuple) for v in values[1:]):
            raise Exhausted("it adds up lists")
        if name in SIZES:
            keyword, largest = SIZES[name]
            size = kwargs.get(keyword, args[1] if len(args) > 1 else 0)
            self._require_small(name, size if isinstance(size, int) else _size(size), largest, args[0])

    def _require_small(self, name: str, size: int, largest: int, value: Any) -> None:
        """Raises Exhausted for a size that is too large, and pays for an indentation, which comes with every line."""
        if abs(size) > largest:
            raise Exhausted(f"it gives {name} a size over {largest}")
        if name == "indent" and isinstance(value, str):
            self.spend(len(value.splitlines()) * abs(size))

    def _measured(self, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > BITS:
            raise Exhausted("it makes a number that is too large")
        self.spend(self._weight(value))
        return value

    def _cost(self, operator: str, left: Any, right: Any) -> int:
        """What an operation makes, before it is made."""
        if isinstance(left, int) and isinstance(right, int):
            return self._cost_of_numbers(operator, left, right)
        if operator == "**":
            return STEP
        if operator == "*":
            value, count = (right, left) if isinstance(left, int) else (left, right)
            return self._weight(value) * max(count, 0) if isinstance(count, int) else 1
        if operator == "%" and isinstance(left, str | bytes):
            text = left if isinstance(left, str) else left.decode("latin-1")
            _require_narrow(PERCENT.findall(text))
            return len(text) + (1 + text.count("%(")) * self._weight(right)
        return self._weight(left) + self._weight(right)

    def _cost_of_numbers(self, operator: str, left: int, right: int) -> int:
        bits = left.bit_length() + right.bit_length()
        bits = left.bit_length() * abs(right) if operator == "**" else bits
        if bits > 2 * BITS or (bits > BITS and operator in ("*", "**")):
            raise Exhausted("it makes a number that is too large")
        return STEP + bits // 3

    def _weight(self, value: Any) -> int:
        """Characters that it would take to write the value, about; not counted further than the budget goes."""
        total, left = 0, [value]
        while left and total <= self.budget:
            v = left.pop()
            total += _size(v)
            if isinstance(v, dict):
                left += [*v.keys(), *v.values()]
            elif isinstance(v, LISTS):
                left += v
            elif isinstance(v, Namespace):  # opaque, and nobody writes one out
                total += self.budget + 1
        return total


class Generation(Extension):
    """{% generation %} marks what the model said, for training; here it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012  as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def strftime_now(format: str) -> str:
    """The local time."""
    if len(format) > 200:
        raise Exhausted("it asks for a date that is too wide")
    _require_narrow(PERCENT.findall(format))
    return datetime.now().strftime(format)


def refuse(message: str) -> None:
    raise Refused(str(message))


def _require_narrow(specs: Sequence[str]) -> None:
    """Raises Exhausted for a width or precision in a format that is too large, or may be."""
    if any(map(WIDE.search, specs)):
        raise Exhausted("it formats to a width that is too large")


def _size(value: Any) -> int:
    """Characters of a text, digits of a number (about), items of a collection; 1 for the rest."""
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    return len(value) if isinstance(value, SIZED) else 1


def _hook(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """A call of a method of the environment, which no name in a template can shadow."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _pay_for_literals(tree: nodes.Node) -> None:
    for node in [tree, *tree.find_all(nodes.Node)]:
        for name, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, name, _paid(value))
            elif isinstance(value, list):
                value[:] = map(_paid, value)


def _paid(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _hook("concatenate", node.nodes)
    literal = isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    sliced = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    return _hook("made", [node]) if literal or sliced else node
