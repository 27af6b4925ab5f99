"""A config file: one flat YAML mapping, read with care."""

import re
from pathlib import Path
from typing import Any

import yaml

from llmrs.core.errors import ConfigError

LARGEST = 2**22  # bytes; a config that is larger is some other file

# YAML 1.1 reads 1e-3 as text, for want of a dot; everybody means the number
EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """A safe loader that refuses aliases, which nest without bound, and keys that come twice."""

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


Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises ConfigError."""
    content = _bytes(path)
    try:
        data = yaml.load(content, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_problem(error)}", "see docs/config.md for an example") from error
    except (ValueError, RecursionError) as error:  # a date that is none, a number without end, deep nesting
        raise ConfigError(f"{path} is not YAML: {error}", "see docs/config.md for an example") from error
    if data is None:
        raise ConfigError(f"{path} is empty", "it holds lines such as `model: demo`")
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no mapping", "it holds lines such as `model: demo`")
    return data


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
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"{error.problem or error.context}" + (f" in line {mark.line + 1}" if mark else "")
    return "it holds bytes that are no text"
