"""What a model's author recommends: generation_config.json, and the tokens that end an answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrs.core.errors import ModelError
from llmrs.models.files.json_reader import SHORT, Fields, read_json
from llmrs.models.files.untrusted import COMPLETE

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
    """From generation_config.json, else config.json, and the tokenizer.

    Raises ModelError for values that are not allowed, and where none of them names an end.
    """
    path = folder / "generation_config.json"
    data = read_json(path) if path.exists() else {}
    main, fallback = folder / "config.json", read_json(folder / "config.json")
    eos = _ids(path, data) or _ids(main, fallback)
    found = dict.fromkeys((*eos, *tokenizer_eos))
    ids = tuple(i for i in found if 0 <= i < vocabulary)  # others are never generated
    if found and not ids:
        where = path if path.exists() and data.get("eos_token_id") is not None else main
        raise ModelError(
            f"{where}: eos_token_id is {SHORT.repr(next(iter(found)))}; ids are 0 to {vocabulary - 1}", COMPLETE
        )
    if not ids:
        raise ModelError(f"{folder} names no end-of-sequence token", "set eos_token_id in generation_config.json")
    sampling = {n: _value(path, data, n) for n in BOUNDS if data.get(n) is not None}
    greedy = data.get("do_sample") is not None and not Fields(path, data).boolean("do_sample")
    return Generation({**sampling, "temperature": 0.0} if greedy else sampling, ids)


def _ids(path: Path, data: dict[str, Any]) -> tuple[int, ...]:
    """The ids that a file gives, in the vocabulary or not."""
    value = data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_whole, ids)):
        raise Fields(path, data).error("eos_token_id", "a token id, or a list of them")
    return tuple(map(int, ids))


def _value(path: Path, data: dict[str, Any], name: str) -> int | float:
    value, (low, high) = data[name], BOUNDS[name]
    if name == "top_k" and value == -1:  # all tokens, as 0
        return 0
    number = type(value) in (int, float) and low <= value <= high
    if not number or (type(low) is int and not _whole(value)):
        kind = "a whole number" if type(low) is int else "a number"
        raise Fields(path, data).error(name, f"{kind} from {low} to {high}")
    return type(low)(value)


def _whole(value: Any) -> bool:
    """Whether it is a whole number, which some files write as 2.0."""
    return type(value) is int or (type(value) is float and value.is_integer())
