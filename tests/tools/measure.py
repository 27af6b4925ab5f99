"""Logical lines per file, and lengths of functions per folder: python tests/tools/measure.py"""

import ast
import io
import math
import statistics
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("core", "backends", "models", "quant", "llmrs", "cli")
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


class Function(NamedTuple):
    """A function and how many lines it takes from `def` on, its docstring not counted."""

    where: str
    lines: int


def sources(*folders: str) -> list[Path]:
    """The Python files of these folders of the repository; without arguments, of the whole package."""
    return sorted(p for f in folders or FOLDERS for p in (ROOT / f).rglob("*.py"))


def logical_lines(path: Path) -> int:
    """Lines that `tokenize` ends with NEWLINE, except those that are only a string: docstrings."""
    count, kinds = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NEWLINE:
            count += kinds != {tokenize.STRING}
            kinds = set()
        elif token.type not in NOT_CODE:
            kinds.add(token.type)
    return count


def functions(path: Path) -> list[Function]:
    """Every function of a file, methods and inner functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defs = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [Function(f"{path.relative_to(ROOT)}:{n.lineno} {n.name}", length(n)) for n in defs]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    doc = node.body[0]
    if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
        lines -= (doc.end_lineno or doc.lineno) - doc.lineno + 1
    return lines


def percentile(values: list[int], part: float) -> int:
    """The smallest value that `part` of the values don't exceed; 0 where there are none."""
    return sorted(values)[math.ceil(part * len(values)) - 1] if values else 0


def main() -> None:
    print(f"{'file':44}{'lines':>7}{'logical':>9}{'functions':>11}{'longest':>9}")
    for path in sources():
        lengths = [f.lines for f in functions(path)]
        total = len(path.read_text(encoding="utf-8").splitlines())
        row = f"{total:7}{logical_lines(path):9}{len(lengths):11}{max(lengths, default=0):9}"
        print(f"{path.relative_to(ROOT)!s:44}{row}")
    print(f"\n{'folder':10}{'logical':>9}{'functions':>11}{'median':>8}{'p90':>5}  longest")
    for folder in (*FOLDERS, ""):
        paths = sources(folder) if folder else sources()
        found = [f for p in paths for f in functions(p)]
        lengths = [f.lines for f in found]
        longest = max(found, key=lambda f: f.lines, default=Function("", 0))
        median = statistics.median(lengths or [0])
        row = f"{sum(map(logical_lines, paths)):9}{len(found):11}{median:8.1f}{percentile(lengths, 0.9):5}"
        print(f"{folder or 'all':10}{row}  {longest.lines} {longest.where}")


if __name__ == "__main__":
    main()
