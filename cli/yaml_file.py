"""Config files: one flat YAML mapping.

Scalars follow YAML 1.2's core schema. YAML 1.1, PyYAML's default, reads `yes` as true, 12:30 as 750, 017 as 15, and
1e-3 as text. Extensions: underscores in numbers, binary numbers (1_000, 0b11), and yes, no, on and off for options that
are true or false. 017, on which the versions disagree, is text.
"""

import re
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

import yaml

from llmrs.core.errors import ConfigError

MAX_BYTES = 2**22
EXAMPLE = "text with any of : # @ % & * ` in it needs quotes; docs/config.md has an example"
NO_TABS = "use spaces instead, or put quotes around the text that holds it"
TAG = "tag:yaml.org,2002:"
YES_NO = ("yes", "on", "no", "off")

DIGITS = "[0-9](?:_?[0-9])*"
SCALARS = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9](?:_?[0-9])*|0o[0-7_]*[0-7]|0x[0-9a-fA-F_]*[0-9a-fA-F]|0b[01_]*[01])",
    "float": rf"[-+]?(?:\.{DIGITS}|{DIGITS}\.(?:{DIGITS})?)(?:[eE][-+]?[0-9]+)?|[-+]?{DIGITS}[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys, and aliases, which can expand without bound."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  # without YAML 1.1's

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""), 0)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(re.sub(r"\.(?=[in])", "", node.value.replace("_", "").lower()))


for tag, pattern in SCALARS.items():
    Loader.add_implicit_resolver(TAG + tag, re.compile(f"(?:{pattern})$"), None)
Loader.add_constructor(TAG + "int", Loader.construct_int)
Loader.add_constructor(TAG + "float", Loader.construct_float)


def read_yaml(path: Path, switches: Collection[str] = ()) -> dict[Any, tuple[Any, int]]:
    """The mapping in a file: key -> (value, line of the key). Raises ConfigError.

    `switches` are keys whose values are true or false, and may be yes, no, on or off.
    """
    content = _read_bytes(path)
    try:
        mapping = _parse(content, switches)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_problem(error)}", NO_TABS if _is_tab(error) else EXAMPLE) from error
    except (ValueError, RecursionError, LookupError, AttributeError) as error:  # an explicit tag that does not fit
        raise ConfigError(f"{path} is not YAML: {error}", EXAMPLE) from error
    if not mapping:
        problem = "is empty" if mapping is not None else "holds no mapping"
        raise ConfigError(f"{path} {problem}", "it needs lines such as `model: demo`")
    return mapping


def _parse(content: bytes, switches: Collection[str]) -> dict[Any, tuple[Any, int]] | None:
    """Key -> (value, line); empty for an empty file, None if it holds no mapping."""
    loader, mapping = Loader(content), dict[Any, tuple[Any, int]]()
    try:
        node = loader.get_single_node()
        if node is None or node.value == "":
            return {}
        if not isinstance(node, yaml.MappingNode) or node.tag != TAG + "map":
            loader.construct_document(node)  # refuses unknown tags
            return None
        for key, value in node.value:
            plain = isinstance(value, yaml.ScalarNode) and value.style is None
            if plain and isinstance(key, yaml.ScalarNode) and key.value in switches and value.value.lower() in YES_NO:
                value.tag = TAG + "bool"
        for (key_node, _), (key, value) in zip(node.value, loader.construct_pairs(node, deep=True), strict=True):
            mark = key_node.start_mark
            if not isinstance(key, Hashable) or key in mapping:
                problem = f"duplicate key {key!r}" if isinstance(key, Hashable) else "a key is no word"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            mapping[key] = value, mark.line + 1
        return mapping
    finally:
        loader.dispose()


def _read_bytes(path: Path) -> bytes:
    if path.is_dir() or path.suffix == ".gguf":
        what = "a folder" if path.is_dir() else "a GGUF file"
        raise ConfigError(f"{path} is {what}", f"give a YAML file, or for a model: --model {path}")
    try:
        with path.open("rb") as file:  # or a pipe
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}", "give a YAML file, or none to use the defaults") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ConfigError(f"{path} can't be read: {error}", "give a YAML file") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes", "give a YAML file, not a model")
    return data


def _problem(error: yaml.YAMLError) -> str:
    """The problem and its line, without line breaks."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "it holds bytes that are not text"
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
    return ("a tab" if _is_tab(error) else f"{problem}") + (f" in line {mark.line + 1}" if mark else "")


def _is_tab(error: yaml.YAMLError) -> bool:
    return isinstance(error, yaml.MarkedYAMLError) and "'\\t'" in f"{error.problem}"
