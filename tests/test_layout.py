"""The rules of the code that a script can check: who imports whom, sizes, and what is never used."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from measure import FOLDERS, ROOT, functions, logical_lines, percentile, sources

# What each part may import of llmrs; `core.errors` allows that module only.
ARROWS = {
    "core": {"core"},
    "quant": {"quant", "core.errors"},
    "models": {"models", "quant", "core.ir", "core.errors", "core.request"},
    "backends": {"backends", "core", "quant"},
    "llmrs": {"llmrs", "models", "backends", "core", "quant"},
    "cli": {"cli", "llmrs", "models", "backends", "core", "quant"},
}
HEAVY = ("torch", "mlx", "triton", "transformers", "tokenizers", "safetensors", "huggingface_hub", "yaml", "jinja2")
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {"eval", "exec", "trust_remote_code"}
BROAD = {"Exception", "BaseException"}
UNBOUND = {
    "backends/testing.py",  # compares a backend with the reference on real families
    "llmrs/__main__.py",  # `python -m llmrs` is the command line
}
BROAD_ALLOWED = {"models/text/tokenizer.py"}  # tokenizers raises plain Exceptions


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    """core/ir.py -> llmrs.core.ir, llmrs/api.py -> llmrs.api, core/__init__.py -> llmrs.core"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "llmrs" else ("llmrs", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sources()}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file names: imports anywhere in it, and strings such as "llmrs.core.ir:Graph"."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            target = node.value.partition(":")[0]
            if re.fullmatch(r"llmrs(\.\w+)+", target) and part(target) != "llmrs":
                yield target


def part(module: str) -> str:
    """The part that a module of llmrs belongs to: a folder, or "llmrs" for the façade."""
    second = module.removeprefix("llmrs.").partition(".")[0]
    return second if second in FOLDERS else "llmrs"


def allowed(importer: str, module: str) -> bool:
    """Whether the part `importer` may import `module`, a full name such as llmrs.core.ir."""
    inner = module.removeprefix("llmrs.")
    return any(part(module) == a or inner == a or inner.startswith(f"{a}.") for a in ARROWS[importer])


def ours(module: str) -> bool:
    return module.split(".")[0] == "llmrs"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_arrows(folder):
    wrong = [
        f"{relative(p)} -> {m}"
        for p in sources(folder)
        for m in imported(p)
        if ours(m) and not allowed(folder, m) and relative(p) not in UNBOUND
    ]
    assert not wrong


def test_the_engine_does_not_import_its_benchmark():
    own = [p for p in sources("llmrs") if p.parent.name == "llmrs"]
    assert not [f"{relative(p)} -> {m}" for p in own for m in imported(p) if m.startswith("llmrs.bench")]


def test_core_imports_only_the_standard_library_and_numpy():
    known = sys.stdlib_module_names | {"numpy", "llmrs"}
    assert not [f"{relative(p)} -> {m}" for p in sources("core") for m in imported(p) if m.split(".")[0] not in known]


def test_no_import_by_bare_folder_name():
    wrong = [
        f"{relative(p)} -> {m}" for p in sources() for m in imported(p) if m.split(".")[0] in set(FOLDERS) - {"llmrs"}
    ]
    assert not wrong


def test_entry_points_follow_the_arrows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"llmrs": "llmrs.cli:main"}
    wrong = [t for t in project["entry-points"]["llmrs.backends"].values() if part(t.partition(":")[0]) != "backends"]
    assert not wrong


def run(code: str, tmp_path: Path, *args: str) -> None:
    """Runs code in a fresh interpreter, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise RuntimeError("imports " + name)

sys.meta_path.insert(0, Block())
"""


def test_core_imports_with_everything_heavy_blocked(tmp_path):
    names = [m for m in MODULES if part(m) == "core"]
    assert len(names) > 1
    run(BLOCK + "".join(f"import {m}\n" for m in names), tmp_path)


NO_PYTEST = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pytest", "_pytest"):
            raise ModuleNotFoundError("no " + name, name=name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # MLX on a machine that has none, and the like
        assert error.name in ("mlx", "triton", "transformers"), (name, error)
"""


def test_only_the_suite_for_backends_imports_pytest(tmp_path):
    names = sorted(m for m in MODULES if m != "llmrs.backends.testing")
    assert "llmrs.backends.mlx.backend" in names
    run(NO_PYTEST, tmp_path, *names)


def test_import_has_no_side_effects(tmp_path):
    code = """
import logging, os, signal, sys, threading

def state():
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    handlers = sorted(f"{x.name}: {h}" for x in loggers for h in x.handlers)
    signals = {s: signal.getsignal(s) for s in signal.valid_signals()}
    return dict(os.environ), handlers, [t.name for t in threading.enumerate()], signals

before = state()
import llmrs
for old, new in zip(before, state()):
    assert old == new, (old, new)
"""
    run(f"{code}\nloaded = set({HEAVY!r}) & set(sys.modules)\nassert not loaded, loaded", tmp_path)


def test_core_is_under_1000_logical_lines():
    assert sum(logical_lines(p) for p in sources("core")) < 1000


def test_files_are_at_most_400_lines():
    long = {relative(p): n for p in sources() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_no_function_is_over_60_lines():
    assert not [f for p in sources() for f in functions(p) if f.lines > 60]


def test_most_functions_are_short():
    lengths = [f.lines for p in sources() for f in functions(p)]
    assert statistics.median(lengths) <= 10
    assert percentile(lengths, 0.9) <= 25


def names_in(node: ast.AST | None) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if node else set()


def broad_handlers(path: Path) -> Iterator[int]:
    """Lines of `except:`, `except Exception`, and `suppress(Exception)`."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or names_in(node.type) & BROAD):
            yield node.lineno
        if isinstance(node, ast.Call) and "suppress" in ast.unparse(node.func):
            yield from (node.lineno for a in node.args if names_in(a) & BROAD)


def test_no_broad_except():
    found = [f"{relative(p)}:{n}" for p in sources() if relative(p) not in BROAD_ALLOWED for n in broad_handlers(p)]
    assert not found


def unsafe(path: Path) -> Iterator[str]:
    """Uses of pickle, eval, exec, remote code, and loaders that unpickle."""
    yield from (m for m in imported(path) if m.split(".")[0] in UNSAFE_MODULES)
    for node in ast.walk(parse(path)):
        match node:
            case ast.Name(id=name) if name in UNSAFE_NAMES:
                yield f"{name}, line {node.lineno}"
            case ast.keyword(arg="trust_remote_code") | ast.Constant(value="trust_remote_code"):
                yield "trust_remote_code"
            case ast.keyword(arg="allow_pickle", value=value) if not (
                isinstance(value, ast.Constant) and not value.value
            ):
                yield "allow_pickle"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield f"torch.load, line {node.lineno}"


def test_nothing_in_the_package_runs_code_from_data():
    assert not [f"{relative(p)}: {u}" for p in sources() for u in unsafe(p)]


@pytest.mark.skipif(sys.platform == "win32", reason="git on Windows may not make links")
def test_type_checkers_see_every_folder_and_file():
    expected = {f: ROOT / f for f in FOLDERS if f != "llmrs"}
    expected |= {p.name: p for p in (ROOT / "llmrs").iterdir() if p.name != "__pycache__"}
    links = {p.name: p for p in (ROOT / ".typing" / "llmrs").iterdir() if p.name != "__pycache__"}
    assert links.keys() == expected.keys()
    assert not [n for n, p in links.items() if not p.is_symlink() or p.resolve() != expected[n].resolve()]


def test_the_counter_of_logical_lines(tmp_path):
    code = (
        '"""Doc."""\n\n# comment\ndef f(\n    x,\n):\n    """Doc\n    more."""\n    y = """a"""\n    return (\n  x)\n'
    )
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    assert logical_lines(tmp_path / "code.py") == 3
