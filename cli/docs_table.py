"""Generates the option tables of docs/config.md: `python -m llmrs.cli.docs_table docs/config.md` updates them."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from llmrs.cli.flags import hidden_flags, visible_flags
from llmrs.cli.options import SECTIONS, BenchOptions
from llmrs.core.options import Option, options


def updated(page: str) -> str:
    """The page with the table after each `<!-- options: TITLE -->` replaced."""
    sections: dict[str, type] = {**SECTIONS, "llmrs bench": BenchOptions}
    for title, cls in sections.items():
        mark = f"<!-- options: {title} -->"
        assert mark in page, f"the page lacks {mark}"
        table = "\n".join([mark, *_rows(cls), ""])
        page = re.sub(re.escape(mark) + r"\n(\|.*\n)*", lambda _, t=table: t, page)  # type: ignore[misc]
    return page


def _rows(cls: type) -> Iterator[str]:
    yield "| key | flags | value | default | meaning |"
    yield "|---|---|---|---|---|"
    for o in options(cls):
        flags = ", ".join(f"`{flag}`" for flag in dict.fromkeys([*visible_flags(o), *hidden_flags(o)]))
        cells = (f"`{o.name}`", flags, o.allowed(), f"`{_default(o)}`", o.help)
        yield "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _default(o: Option) -> str:
    if o.name == "max_num_seqs":
        return "32, 8 on macOS"
    return str(o.default).lower() if isinstance(o.default, bool) else "null" if o.default is None else str(o.default)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text("utf-8")), "utf-8")
