"""Translates a kernel in the Metal Shading Language (MSL), as MLX generates it, to C++ for the shim.

Rejects C++ that is not MSL: pointers without an address space, double, std::, unknown attributes, and the rest of
REFUSED. Pointers become `ms::ptr<space, type>`, threadgroup arrays `ms::shared`.
"""

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"#[^\n]*|[A-Za-z_]\w*|\d[\w.]*(?:[eE][+-]?\d+f?)?|\.\d\w*|::|->|&&|\|\||<<|>>|\[\[|\s+|.", re.DOTALL
)
SPACES = {"device", "constant", "threadgroup", "thread"}
NUMBERS = "bool char uchar short ushort int uint long ulong half float bfloat size_t float16_t bfloat16_t".split()
FIXED = [f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)]
TYPES = {*NUMBERS, *FIXED, "void", "auto", "vec", "simdgroup_matrix", "atomic", "atomic_uint", "atomic_int"}
TYPES |= {f"{t}{n}" for t in NUMBERS for n in (2, 3, 4)} | {f"simdgroup_{t}8x8" for t in ("float", "half", "bfloat")}
REFUSED = {
    "double": "MSL has no double",
    "std": "MSL has no standard library",
    "static": "MSL has no static variables in functions",
    "goto": "MSL has no goto",
    **dict.fromkeys(
        ("new", "delete", "throw", "try", "catch", "virtual", "typeid", "dynamic_cast", "thread_local", "asm"),
        "not part of MSL",
    ),
    **dict.fromkeys(
        ("concept", "requires", "consteval", "constinit", "co_await", "co_return"), "newer than MSL's C++14"
    ),
}
ATTRIBUTES = {  # of kernel parameters: type, and the expression in the shim
    "thread_position_in_grid": ("uint3", "t.in_grid"),
    "thread_position_in_threadgroup": ("uint3", "t.in_group"),
    "threadgroup_position_in_grid": ("uint3", "t.group"),
    "threads_per_threadgroup": ("uint3", "t.group_size"),
    "threadgroups_per_grid": ("uint3", "t.groups"),
    "threads_per_grid": ("uint3", "t.grid"),
    "thread_index_in_threadgroup": ("uint", "t.index"),
    "thread_index_in_simdgroup": ("uint", "t.lane"),
    "simdgroup_index_in_threadgroup": ("uint", "t.simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "(ms::count + 31) / 32"),
    "threads_per_simdgroup": ("uint", "32u"),
}
KERNEL = re.compile(r"\[\[\s*kernel\s*\]\]\s+void\s+(\w+)\s*\((.*?)\)\s*\{", re.DOTALL)
INSTANCE = re.compile(
    r"^template\s*\[\[host_name\([^\n]*\)\]\]\s*\[\[kernel\]\]\s*decltype\((.*?)\)\s[^\n]*;\s*$", re.M
)


class MetalError(Exception):
    """The kernel is not MSL, does not compile, or misbehaves at run time."""


@dataclass
class Source:
    """A kernel as C++: its buffer parameters in order, and the translated text."""

    name: str
    buffers: list[str] = field(default_factory=list)
    body: str = ""


def translate(msl: str) -> Source:
    """The C++ of one kernel. Raises MetalError for invalid or unsupported MSL."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", lambda m: re.sub(r"[^\n]", " ", m[0]), msl, flags=re.DOTALL)
    match = KERNEL.search(text)
    if not match:
        raise MetalError("no [[kernel]] function")
    instances = INSTANCE.findall(text)
    if len(instances) > 1:
        raise MetalError("more than one instance of a kernel")
    source = Source(instances[0].partition("<")[0] if instances else match[1])
    arguments = [_argument(p, source) for p in _split(match[2])]
    text = INSTANCE.sub("", text)
    _check(text)
    text = re.sub(r"\[\[.*?\]\]", "", text)
    call = f"{instances[0] if instances else match[1]}({', '.join(arguments)})"
    source.body = (
        "".join(_Rewriter(text).run()) + f"\nstatic void ms_body(const ms::Thread& t) {{ (void)t; {call}; }}\n"
    )
    return source


def _split(parameters: str) -> list[str]:
    """Splits parameters at commas outside of brackets."""
    return [p.strip() for p in re.split(r",(?![^<(\[]*[>)\]])", parameters) if p.strip()]


def _argument(parameter: str, source: Source) -> str:
    """The shim's argument for a parameter of the kernel."""
    match = re.fullmatch(r"(.*?)(\w+)\s*\[\[\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?\s*\]\]", parameter, re.DOTALL)
    if not match:
        raise MetalError(f"a parameter without an attribute: {parameter}")
    declared, name, attribute, number = (match[1].strip(), *match.groups()[1:])
    if attribute == "buffer":
        if int(number) != len(source.buffers):
            raise MetalError(f"buffer {number} out of order")
        source.buffers.append(name)
        plain = declared.rstrip("&").replace("constant", "").replace("device", "")
        return f"ms::reference<{plain}>({number})" if declared.endswith("&") else f"ms::Argument{{{number}}}"
    if attribute not in ATTRIBUTES:
        raise MetalError(f"unknown attribute [[{attribute}]]")
    if declared != ATTRIBUTES[attribute][0]:
        raise MetalError(f"{attribute} is {ATTRIBUTES[attribute][0]}, not {declared}")
    return ATTRIBUTES[attribute][1]


def _check(text: str) -> None:
    for attribute in re.findall(r"\[\[\s*(\w+)", text):
        if attribute not in {"kernel", "buffer", *ATTRIBUTES}:
            raise MetalError(f"unknown attribute [[{attribute}]]")
    tokens = TOKEN.findall(text)
    for token in tokens:
        if token in REFUSED:
            raise MetalError(f"{token}: {REFUSED[token]}")
        if token.startswith("#include") and not re.search(r"<metal_\w+>", token):
            raise MetalError(f"{token}: not a header of MSL")
    if re.search(r"\blong\s+long\b|\bif\s+constexpr\b|\blambda\b|(?:=|\(|,|return)\s*\[[&=]?\]\s*\(", text):
        raise MetalError("long long, if constexpr and lambdas are not part of MSL's C++14")
    for number in re.findall(r"(?<![\w.])(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?[\w.]*", text):
        if not number.endswith(("f", "h")):
            raise MetalError(f"{number}: C++ would take it for a double; say {number}f")
    if match := re.search(r"\b0[xX][\da-fA-F.]+[pP]", text):
        raise MetalError(f"{match[0]}: hexadecimal floats are newer than MSL's C++14")


class _Rewriter:
    """Rewrites the tokens; `run` returns pieces of C++."""

    def __init__(self, text: str) -> None:
        self.tokens = TOKEN.findall(text)
        self.at = self.depth = 0
        declared = re.findall(r"\b(?:typename|class|struct|using)\s+(\w+)|\btypedef\s[^;]*?(\w+)\s*;", text)
        self.types = TYPES | {n for pair in declared for n in pair if n}

    def run(self) -> list[str]:
        out: list[str] = []
        while self.at < len(self.tokens):
            out.append(self.step(out))
        return out

    def step(self, out: list[str]) -> str:
        token = self.tokens[self.at]
        if token in SPACES and self.peek(1) != "(":
            return self.declaration(out)
        if token in self.types:
            return self.type_name()
        self.at += 1
        self.depth += (token == "{") - (token == "}")
        if token == "reinterpret_cast":
            return "ms::cast"
        return "" if token.startswith("#include") else token

    def peek(self, ahead: int) -> str:
        """The `ahead`th token from here that is not a space; empty at the end."""
        solid = (t for t in self.tokens[self.at :] if not t.isspace())
        for _ in range(ahead):
            next(solid, "")
        return next(solid, "")

    def skip(self) -> None:
        while self.at < len(self.tokens) and self.tokens[self.at].isspace():
            self.at += 1

    def accept(self, *wanted: str) -> bool:
        self.skip()
        if self.at < len(self.tokens) and self.tokens[self.at] in wanted:
            self.at += 1
            return True
        return False

    def take_type(self) -> str:
        """`T`, `metal::vec<T, 4>`: a name with its template arguments."""
        self.skip()
        begin, self.at = self.at, self.at + 1
        while self.at + 1 < len(self.tokens) and self.tokens[self.at] == "::":
            self.at += 2
        if self.peek(0) == "<":
            level = 0
            while True:
                token = self.tokens[self.at]
                level += (token == "<") - (token == ">") - 2 * (token == ">>")
                self.at += 1
                if level == 0 and token in (">", ">>"):
                    break
        return "".join(self.tokens[begin : self.at])

    def type_name(self) -> str:
        """A type outside of a declaration with an address space: no pointer may follow."""
        name = self.take_type()
        following = self.peek(0)
        if following in ("*", "&") or (following == "const" and self.peek(1) in ("*", "&")):
            raise MetalError(f"a missing address space on a pointer: {name} {following}{self.peek(1)}")
        return name

    def declaration(self, out: list[str]) -> str:
        """`device const T* ...`, `threadgroup T name[...]...`, with the address space at the current token."""
        space = self.tokens[self.at]
        self.at += 1
        const = _pop_const(out)
        while self.accept("const"):
            const = True
        constexpr = self.accept("constexpr")
        kind = self.take_type()
        while self.accept("const"):
            const = True
        kind = f"const {kind}" if const else kind
        if self.accept("*"):
            if self.peek(0) == "*":
                raise MetalError(f"a pointer to a pointer: {space} {kind}**")
            return f"{kind}* " if space == "thread" else f"ms::ptr<ms::{space}_, {kind}> "
        if self.peek(0) in ("&", "(") or space == "thread":
            return f"{kind} "
        return self.variable(space, kind, constexpr)

    def variable(self, space: str, kind: str, constexpr: bool) -> str:
        if space == "device" or (space == "constant" and self.depth):
            raise MetalError(f"a variable in the {space} address space: {kind} {self.peek(0)}")
        if space == "constant":
            return f"static {'constexpr ' if constexpr else 'const '}{kind.removeprefix('const ')} "
        begin = self.at
        while self.tokens[self.at] != ";":
            self.at += 1
        return " ".join(_shared(kind, n) for n in "".join(self.tokens[begin : self.at]).split(","))


def _pop_const(out: list[str]) -> bool:
    """Removes a `const` before the address space from the output."""
    at = len(out) - 1
    while at >= 0 and out[at].isspace():
        at -= 1
    if at < 0 or out[at] != "const":
        return False
    out[at] = ""
    return True


def _shared(kind: str, declarator: str) -> str:
    match = re.fullmatch(r"\s*(\w+)\s*\[([^\]]+)\]\s*", declarator)
    if not match:
        raise MetalError(f"a threadgroup variable that is no one-dimensional array: {declarator.strip()}")
    name, size = match.groups()
    return f'static ms::shared<{kind}, ({size})> ms_{name}; const auto {name} = ms_{name}.enter("{name}");'
