"""Every option, defined once: YAML keys, flags, Python arguments and the docs derive from here.

An option is a dataclass field made by `option(...)`; `options(cls)` lists them as `Option` records, and
`build(mapping, *classes)` turns one flat mapping (a YAML file, the flags) into checked instances.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from llmrs.core.errors import ConfigError, did_you_mean

CASTS: tuple[tuple[Callable[[Any], Any], Any], ...] = (
    *((bool, np.bool_), (int, int | np.integer), (float, float | np.floating)),
    (str.__str__, str),  # str() of a text enum may be its name
)


@dataclass(frozen=True)
class Option:
    """One option. `kind` is its Python type: bool, int, float, str, a list of `element`, or a dict from token ids to
    `element`. `optional` allows None; `most` limits the entries of a list or dict. Tuples, sets, ranges, NumPy arrays
    and single elements are accepted as lists, NumPy scalars as Python's.
    """

    name: str
    kind: type
    element: type
    optional: bool
    default: Any
    help: str
    aliases: tuple[str, ...]
    choices: tuple[str, ...]
    low: int | float
    high: int | float
    most: int

    def check(self, value: Any) -> Any:
        """The value as `kind`; lists and dicts are copied. Raises ConfigError with the value and the allowed ones."""
        if value is None and self.optional:
            return None
        value = self._cast(value)
        elements: list[Any] = [*value.values()] if type(value) is dict else value if type(value) is list else [value]
        keys = value if type(value) is dict else ()
        if type(value) is not self.kind or any(type(k) is not int or not 0 <= k < 2**31 for k in keys):
            raise self.error(value)
        for v in elements:
            wrong = type(v) is not self.element or (v == "" and self.kind is list)
            if wrong or (self.element in (int, float) and not self.low <= v <= self.high):
                raise self.error(v)  # NaN fails both comparisons
        if len(elements) > self.most:
            raise ConfigError(f"{self.name}: {len(elements)} entries are too many; at most {self.most} are allowed")
        if self.choices and value not in self.choices:
            raise self.error(value, did_you_mean(str(value), self.choices))
        return value

    def _cast(self, value: Any) -> Any:
        """NumPy values as Python's, one value as a list for list options, ints as floats for float options."""
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if self.kind is list:
            many = isinstance(value, list | tuple | range | set | frozenset)
            return [self._number(v) for v in (value if many else (value,))]
        if self.kind is dict and isinstance(value, Mapping):
            return {plain(k): self._number(v) for k, v in value.items()}
        return self._number(value)

    def _number(self, value: Any) -> Any:
        """Ints as floats for float options."""
        value = plain(value)
        if self.element is float and type(value) is int:
            return float(value) if abs(value) < 2**1000 else math.inf
        return value

    def error(self, value: Any, hint: str = "") -> ConfigError:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        return ConfigError(f"{self.name}: {shown} is not allowed; it must be {self.allowed()}", hint or self.help)

    def allowed(self) -> str:
        """The accepted values, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        text = ("a table from token ids to " if self.kind is dict else "") + words[self.element]
        if self.high < math.inf:
            text += f" from {self.low} to {self.high}"
        elif self.low > -math.inf:
            text += f" of at least {self.low}"
        return f"{text}, or a list of these, none empty" if self.kind is list else text


def plain(value: Any) -> Any:
    """NumPy scalars and subclasses (enums, ...) as bool, int, float or str."""
    if type(value) in (bool, int, float, str):
        return value
    return next((cast(value) for cast, kinds in CASTS if isinstance(value, kinds)), value)


def option(
    default: Any, help: str, aliases: tuple[str, ...] = (), choices: tuple[str, ...] = (), low: int | float = -math.inf,
    high: int | float = math.inf, most: int = 2**20,
) -> Any:  # fmt: skip
    """A dataclass field that is an option; `aliases` are further YAML keys and flags for it."""
    metadata = {"help": help, "aliases": aliases, "choices": choices, "low": low, "high": high, "most": most}
    return field(default=default, metadata=metadata)


@cache
def options(cls: type) -> list[Option]:
    """The options of a dataclass in the order in which they are written, those of its base last."""
    hints, found = get_type_hints(cls), []
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__):
        union = get_args(hints[f.name]) if isinstance(hints[f.name], UnionType) else (hints[f.name],)
        kind = next(k for k in union if k is not type(None))
        element = (get_args(kind) or (kind,))[-1]
        found.append(Option(f.name, get_origin(kind) or kind, element, type(None) in union, f.default, **f.metadata))
    return found


class Checked:
    """Base of the option classes: checks every field of a new instance."""

    def __post_init__(self) -> None:
        cls: type = type(self)
        for o in options(cls):
            object.__setattr__(self, o.name, o.check(getattr(self, o.name)))


@dataclass(frozen=True)
class SamplingParams(Checked):
    """How a request's tokens are sampled, and when it ends.

    A value of None is taken from the engine's defaults (the YAML file), else from the model's generation_config.json,
    else from BUILT_IN.
    """

    temperature: float | None = option(None, "0 (below 1e-5): greedy; higher: more random", low=0.0, high=100.0)
    max_tokens: int | None = option(None, "maximum number of generated tokens (4096)", low=1, high=2**24)
    top_k: int | None = option(None, "sample from the k most likely tokens; 0: off", low=0, high=2**31 - 1)
    top_p: float | None = option(
        None, "sample from the most likely tokens that make up this probability; 1: off", low=0.0, high=1.0
    )
    min_p: float | None = option(
        None, "drop tokens below this fraction of the highest probability; 0: off", low=0.0, high=1.0
    )
    repetition_penalty: float | None = option(
        None, "above 1: tokens of the prompt and the output become less likely; 1: off", low=0.01, high=100.0
    )
    presence_penalty: float | None = option(
        None, "subtracted from a token's logit once it was generated", low=-2.0, high=2.0
    )
    frequency_penalty: float | None = option(
        None, "subtracted from a token's logit for every time it was generated", low=-2.0, high=2.0
    )
    logit_bias: dict[int, float] | None = option(
        None, "added to the logits of these tokens", low=-100.0, high=100.0, most=1024
    )
    allowed_token_ids: list[int] | None = option(None, "sample only from these tokens", low=0, high=2**31 - 1)
    seed: int | None = option(None, "the same seed gives the same output; null: random", low=0, high=2**64 - 1)
    n: int = option(1, "outputs per prompt; output 0 uses the seed, the others seeds derived from it", low=1, high=16)
    ignore_eos: bool = option(False, "continue after the end-of-sequence token")
    min_tokens: int = option(
        0, "generated tokens before end of sequence, stop tokens and stop strings apply", low=0, high=2**24
    )
    stop: list[str] | None = option(
        None, "stop strings, left out of the output; they may contain special tokens", most=16
    )
    stop_token_ids: list[int] | None = option(None, "stop tokens", low=0, high=2**31 - 1, most=16)
    skip_special_tokens: bool = option(True, "leave special tokens, such as end of sequence, out of the text")
    logprobs: int | None = option(
        None, "log probabilities of each generated token and of the k most likely ones; null: off", low=0, high=20
    )
    prompt_logprobs: int | None = option(None, "the same for each prompt token", low=0, high=20)
    priority: int = option(0, "lower runs first; 1 is worth 10 s of waiting", low=-1000, high=1000)

    def over(self, *defaults: "SamplingParams") -> "SamplingParams":
        """These values, with those left at None taken from the first of `defaults` that has one."""
        unset = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is None]
        found: dict[str, Any] = {}
        for name in unset:
            found[name] = next((getattr(d, name) for d in defaults if getattr(d, name) is not None), None)
        return dataclasses.replace(self, **found)


BUILT_IN = SamplingParams(
    temperature=1.0, max_tokens=4096, top_k=0, top_p=1.0, min_p=0.0,
    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
)  # fmt: skip


def build(values: Mapping[str, Any], *classes: type) -> list[Any]:
    """One instance of each class from a flat mapping. Raises ConfigError for a key that none of them knows."""
    owners = {name: (cls, o) for cls in classes for o in options(cls) for name in (o.name, *o.aliases)}
    chosen: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for key, value in values.items():
        if key not in owners:
            raise ConfigError(f"unknown option {key!r}", did_you_mean(str(key), owners))
        cls, o = owners[key]
        if o.name in chosen[cls]:
            raise ConfigError(f"{key!r} sets {o.name!r}, which is set already", "keep one of the two")
        chosen[cls][o.name] = value
    return [cls(**chosen[cls]) for cls in classes]
