"""generation_config.json: recommended sampling parameters and end-of-sequence tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import ConfigReader, read_json, short_repr
from llmrs.models.files.untrusted import COMPLETE

BOUNDS = {
    "temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "top_k": (0, 2**31 - 1),
    "repetition_penalty": (0.01, 100.0),
}  # fmt: skip
GGUF_NAMES = {
    "temperature": "temp", "top_p": "top_p", "min_p": "min_p", "top_k": "top_k", "repetition_penalty": "penalty_repeat",
}  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """Recommended sampling values, under SamplingParams' names, and end-of-sequence ids."""

    sampling: dict[str, Any]
    eos_ids: tuple[int, ...]


def read_generation(folder: Path, vocab_size: int, tokenizer_eos: tuple[int, ...]) -> Generation:
    """EOS ids are those of generation_config.json (else config.json) and of the tokenizer.

    Raises ModelError for invalid values, and without an EOS id in the vocabulary.
    """
    path = folder / "generation_config.json"
    data = read_json(path) if path.exists() else {}
    main, fallback = folder / "config.json", read_json(folder / "config.json")
    eos = _eos_ids(path, data) or _eos_ids(main, fallback)
    given = dict.fromkeys((*eos, *tokenizer_eos))
    ids = tuple(i for i in given if 0 <= i < vocab_size)
    if given and not ids:
        source = path if path.exists() and data.get("eos_token_id") is not None else main
        shown = short_repr(next(iter(given)))
        raise ModelError(f"{source}: eos_token_id is {shown}; ids are 0 to {vocab_size - 1}", COMPLETE)
    if not ids:
        raise ModelError(f"{folder} names no end-of-sequence token", "set eos_token_id in generation_config.json")
    sampling = {n: _value(path, data, n, n) for n in BOUNDS if data.get(n) is not None}
    greedy = data.get("do_sample") is not None and not ConfigReader(path, data).boolean("do_sample")
    return Generation({**sampling, "temperature": 0.0} if greedy else sampling, ids)


def gguf_sampling(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Recommended sampling values of a GGUF file, under SamplingParams' names. Raises ModelError for invalid ones."""
    keys = {name: f"general.sampling.{key}" for name, key in GGUF_NAMES.items()}
    return {name: _value(path, metadata, name, key) for name, key in keys.items() if key in metadata}


def _eos_ids(path: Path, data: dict[str, Any]) -> tuple[int, ...]:
    """eos_token_id as a tuple, which may hold ids outside of the vocabulary."""
    value = data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_is_integer, ids)):
        raise ConfigReader(path, data).error("eos_token_id", "a token id, or a list of them")
    return tuple(map(int, ids))


def _value(path: Path, data: Mapping[str, Any], name: str, key: str) -> int | float:
    value, (low, high) = data[key], BOUNDS[name]
    if name == "top_k" and type(value) in (int, float) and value == -1:  # disabled, as 0
        return 0
    number = type(value) in (int, float) and low <= value <= high
    if not number or (type(low) is int and not _is_integer(value)):
        kind = "a whole number" if type(low) is int else "a number"
        raise ConfigReader(path, data).error(key, f"{kind} from {low} to {high}")
    return type(low)(value)


def _is_integer(value: Any) -> bool:
    """Some files write integers as 2.0."""
    return type(value) is int or (type(value) is float and value.is_integer())
