"""The tables of docs/config.md, made from the options: `python -m llmrs.cli.docs_table docs/config.md` renews them."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from llmrs.cli.flags import hidden, visible
from llmrs.cli.options import SECTIONS, BenchOptions
from llmrs.core.options import Option, options

MARK = "<!-- options: {} -->"


def tables() -> dict[str, str]:
    """Heading -> Markdown table."""
    sections: dict[str, type] = {**SECTIONS, "llmrs bench": BenchOptions}
    return {title: "\n".join(_rows(cls)) for title, cls in sections.items()}


def renewed(text: str) -> str:
    """The page with each table after its mark replaced."""
    for title, table in tables().items():
        mark = MARK.format(title)
        assert mark in text, f"the page lacks {mark}"
        text = re.sub(re.escape(mark) + r"\n(\|.*\n)*", lambda _, m=mark, t=table: f"{m}\n{t}\n", text)  # type: ignore[misc]
    return text


def _rows(cls: type) -> Iterator[str]:
    yield "| key | flags | value | default | meaning |"
    yield "|---|---|---|---|---|"
    for o in options(cls):
        flags = ", ".join(f"`{flag}`" for flag in dict.fromkeys([*visible(o), *hidden(o)]))
        cells = (f"`{o.name}`", flags, o.allowed(), f"`{_default(o)}`", o.help)
        yield "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _default(o: Option) -> str:
    if o.name == "max_num_seqs":
        return "32, 8 on macOS"
    return str(o.default).lower() if isinstance(o.default, bool) else "null" if o.default is None else str(o.default)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(renewed(page.read_text("utf-8")), "utf-8")
