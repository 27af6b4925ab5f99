"""A bounded search for cuts at load, for a device of which none are stored, and the file that keeps what it found.

The file holds numbers of a program that may have been another, or anything: of what it says only candidates count.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from llmrs.backends.torch import kernel_configs, kernels
from llmrs.backends.torch.kernel_configs import Cut, Cuts, Device, Key, attention_key, candidates
from llmrs.core.ir import Graph, Weight

BUDGET = 10.0  # seconds; the candidate under way when they are spent is finished
GAIN = 0.97  # of the default's time: what is nearer to it is noise
LARGEST = 2**20  # bytes of a file
FAILURES = (TritonError, RuntimeError)  # too few registers or too little memory, what this Triton can't compile

Time = Callable[[Key, Cut], float]  # seconds of a launch with this cut


@dataclass(frozen=True)
class Trial:
    """One candidate's time in seconds; None: it does not run here, and why."""

    key: Key
    cut: Cut
    seconds: float | None
    error: str = ""


def keys_of(graph: Graph, dtype: torch.dtype, kv_dtype: torch.dtype) -> list[Key]:
    """What a model's launches are looked up by, first where most is to be gained."""
    equations = [e for f in (*graph.functions.values(), graph.main) for e in f.equations]
    attends = [(e.inputs[0].type.sizes, e.inputs[1].type.sizes) for e in equations if e.op == "attend"]
    heads = dict.fromkeys((q[0] // kv[0], q[1]) for q, kv in attends)
    weights = [
        [i for i in e.inputs if isinstance(i, Weight)]
        for e in equations
        if e.op in ("linear", "merged_linear", "lm_head")
    ]
    matrices = dict.fromkeys(of[0].type.sizes for of in weights)
    return [
        *(attention_key(*h, dtype, kv_dtype, prompt=False) for h in heads),
        *(Key("matvec", m, (dtype,)) for m in matrices),
        *(attention_key(*h, dtype, kv_dtype, prompt=True) for h in heads),
    ]


def tune(cuts: Cuts, keys: Sequence[Key], seconds: Time, path: Path, budget: float = BUDGET) -> list[Trial]:
    """Sets the cuts of these keys, from the file where it has them; what was tried. Warns of files it can't use."""
    stored = load(path, cuts.device)
    known = usable(stored, cuts.device, keys)
    found, trials = search(
        [k for k in keys if k not in known and len(candidates(k, cuts.device)) > 1], cuts.device, seconds, budget
    )
    cuts.known |= known | found
    if found:
        save(path, cuts.device, stored | {str(k): [*c] for k, c in found.items()})
    return trials


def search(
    keys: Iterable[Key],
    device: Device,
    seconds: Time,
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[Key, Cut], list[Trial]]:
    """The fastest candidate of each key, and all trials. A key that was not finished in time, or of which no candidate
    runs, is left out."""
    end, found, trials = clock() + budget, dict[Key, Cut](), list[Trial]()
    for key in keys:
        these: list[Trial] = []
        for cut in candidates(key, device):
            if clock() >= end:
                return found, trials
            these.append(_try(key, cut, seconds))
            trials.append(these[-1])
        if any(t.seconds is not None for t in these):
            found[key] = _fastest(these)
    return found, trials


def _try(key: Key, cut: Cut, seconds: Time) -> Trial:
    try:
        return Trial(key, cut, seconds(key, cut))
    except FAILURES as error:
        return Trial(key, cut, None, str(error))


def _fastest(trials: Sequence[Trial]) -> Cut:
    """The first, which is the default, unless another is faster by more than noise."""
    times = {t.cut: t.seconds for t in trials if t.seconds is not None}
    best = min(times, key=times.__getitem__)
    first = trials[0].cut
    return first if first in times and times[best] > GAIN * times[first] else best


# The file


def cache_file(device: Device) -> Path:
    """Where a device's cuts are kept, for this Triton and these kernels."""
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or local or os.path.expanduser("~/.cache"))
    name = re.sub(r"[^\w.]+", "_", f"{device.name} {triton.__version__} {_sources()}")
    return folder / "llmrs" / "tuned" / f"{name}.json"


def _sources() -> str:
    """A hash of what decides which cuts there are and what they do."""
    found = hashlib.sha256()
    for path in (*sorted(Path(kernels.__file__ or "").parent.glob("*.py")), Path(kernel_configs.__file__)):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _about(device: Device) -> dict[str, Any]:
    return {"device": device.name, "capability": [*device.capability], "triton": triton.__version__, "of": _sources()}


def load(path: Path, device: Device) -> dict[str, Any]:
    """The table of a file; empty where there is none, and with a warning where it is not one that `save` made."""
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise ValueError("not a file of cuts")
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict) or data.get("about") != _about(device) or not isinstance(data.get("cuts"), dict):
            raise ValueError("not the cuts of this device, Triton and kernels")
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
        return {}
    return data["cuts"]


def usable(stored: Mapping[str, Any], device: Device, keys: Iterable[Key]) -> dict[Key, Cut]:
    """The cuts of these keys in a file's table. Warns of what is not among the candidates."""
    found: dict[Key, Cut] = {}
    for key in (k for k in keys if str(k) in stored):
        cut = next((c for c in candidates(key, device) if [*c] == stored[str(key)]), None)
        if cut is None:
            warnings.warn(f"a stored cut of {key} is ignored: {stored[str(key)]!r:.60}", stacklevel=2)
        else:
            found[key] = cut
    return found


def save(path: Path, device: Device, table: Mapping[str, Any]) -> None:
    """Writes a file, which is there whole or not at all. Warns where it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            new.write_text(json.dumps({"about": _about(device), "cuts": table}, indent=1), "utf-8")
            new.replace(path)
    except OSError as error:
        warnings.warn(f"what was tuned is not kept: {error}", stacklevel=2)
