"""A config file: one flat YAML mapping, read with care.

Words and numbers are those of YAML 1.2's core schema, which is what people mean today. YAML 1.1, which PyYAML reads
by itself, takes `yes` for true, 12:30 for 750, 017 for 15, and 1e-3 for text. Beyond YAML 1.2 numbers may have
underscores and be binary (1_000, 0b11), and yes, no, on and off stand for true and false where an option is one of the
two. 017, of which the versions disagree, is no number here.
"""

import re
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

import yaml

from llmrs.core.errors import ConfigError

LARGEST = 2**22  # bytes; a config that is larger is some other file
EXAMPLE = "text with any of : # @ % & * ` in it needs quotes; docs/config.md has an example"
MAPPING = "tag:yaml.org,2002:map"
WORDS = ("yes", "on", "no", "off")

# what a plain scalar means, by its tag: the pattern, and the characters with which it may begin
DIGITS = "[0-9](?:_?[0-9])*"
SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (
        r"[-+]?(?:0|[1-9](?:_?[0-9])*|0o[0-7_]*[0-7]|0x[0-9a-fA-F_]*[0-9a-fA-F]|0b[01_]*[01])",
        list("-+0123456789"),
    ),
    "float": (
        rf"[-+]?(?:\.{DIGITS}|{DIGITS}\.(?:{DIGITS})?)(?:[eE][-+]?[0-9]+)?|[-+]?{DIGITS}[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class Loader(yaml.SafeLoader):
    """A safe loader that refuses aliases, which nest without bound, and keys that come twice."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  # none of YAML 1.1's

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} comes twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""), 0)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"\.(?=[in])", "", node.value.replace("_", "").lower()))


for tag, (pattern, first) in SCALARS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), first)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_float)


def read_yaml(path: Path, switches: Collection[str] = ()) -> dict[Any, tuple[Any, int]]:
    """The mapping in a file: key -> value, and the line of the key. Raises ConfigError.

    `switches` are keys whose values are true or false, and may be other words for them.
    """
    content = _bytes(path)
    try:
        found = _mapping(content, switches)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_problem(error)}", _advice(error)) from error
    except (ValueError, RecursionError, LookupError, AttributeError) as error:  # a tag that does not suit its value
        raise ConfigError(f"{path} is not YAML: {error}", EXAMPLE) from error
    if not found:
        what = "is empty" if found is not None else "holds no mapping"
        raise ConfigError(f"{path} {what}", "it holds lines such as `model: demo`")
    return found


def _mapping(content: bytes, switches: Collection[str]) -> dict[Any, tuple[Any, int]] | None:
    """Key -> value and line; empty for an empty file, None for one that holds something else."""
    loader, found = Loader(content), dict[Any, tuple[Any, int]]()
    try:
        node = loader.get_single_node()
        if node is None or node.value == "":
            return {}
        if not isinstance(node, yaml.MappingNode) or node.tag != MAPPING:
            loader.construct_document(node)  # refuses tags that are not allowed
            return None
        for key, value in node.value:
            _take_word(value, isinstance(key, yaml.ScalarNode) and key.value in switches)
        for (place, _), (key, value) in zip(node.value, loader.construct_pairs(node, deep=True), strict=True):
            mark = place.start_mark
            if not isinstance(key, Hashable) or key in found:
                problem = f"the key {key!r} comes twice" if isinstance(key, Hashable) else "a key is no word"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            found[key] = value, mark.line + 1
        return found
    finally:
        loader.dispose()


def _take_word(node: yaml.Node, switch: bool) -> None:
    """Reads `yes` and the like as true or false, where that is what is wanted."""
    if switch and isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in WORDS:
        node.tag = "tag:yaml.org,2002:bool"


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", f"give a YAML file, or for a model: --model {path}")
    try:
        with path.open("rb") as file:  # a pipe will do
            data = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}", "give a YAML file, or none to use the defaults") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ConfigError(f"{path} can't be read: {error}", "give a YAML file") from error
    if len(data) > LARGEST:
        raise ConfigError(f"{path} is larger than {LARGEST} bytes", "give a YAML file, not a model")
    return data


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "it holds bytes that are no text"
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
    return ("a tab" if _at_tab(error) else f"{problem}") + (f" in line {mark.line + 1}" if mark else "")


def _at_tab(error: yaml.YAMLError) -> bool:
    return isinstance(error, yaml.MarkedYAMLError) and "'\\t'" in f"{error.problem}"


def _advice(error: yaml.YAMLError) -> str:
    return "put spaces in its place, or quotes around the text that holds it" if _at_tab(error) else EXAMPLE
