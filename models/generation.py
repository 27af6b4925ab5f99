"""What a model's author recommends: generation_config.json, and the tokens that end an answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.config import SHORT, Fields, read_json

BOUNDS = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True)
class Generation:
    """Recommended sampling values, by SamplingParams' names, and end-of-sequence ids."""

    sampling: dict[str, Any]
    eos_ids: tuple[int, ...]


def read_generation(folder: Path, vocabulary: int, tokenizer_eos: tuple[int, ...]) -> Generation:
    """From generation_config.json, else config.json, and the tokenizer; raises ModelError where none names an end."""
    path = folder / "generation_config.json"
    data = read_json(path) if path.exists() else {}
    main, fallback = folder / "config.json", read_json(folder / "config.json")
    eos = _ids(path, data.get("eos_token_id"), vocabulary)
    eos = eos or _ids(main, fallback.get("eos_token_id"), vocabulary)
    ids = tuple(dict.fromkeys((*eos, *tokenizer_eos)))
    if not ids:
        raise ModelError(f"{folder} names no end-of-sequence token", "set eos_token_id in generation_config.json")
    sampling = {n: _value(path, data, n) for n in BOUNDS if data.get(n) is not None}
    return Generation({**sampling, "temperature": 0.0} if data.get("do_sample") is False else sampling, ids)


def _ids(path: Path, value: Any, vocabulary: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocabulary:
            raise ModelError(
                f"{path}: eos_token_id is {SHORT.repr(i)}; ids are 0 to {vocabulary - 1}", "is the file complete?"
            )
    return tuple(ids)


def _value(path: Path, data: dict[str, Any], name: str) -> int | float:
    value, (low, high) = data[name], BOUNDS[name]
    if type(value) not in (int, float) or not low <= value <= high:
        raise Fields(path, data).error(name, f"a number from {low} to {high}")
    return type(low)(value)
