"""From process start to the first token: `llmrs run` as a whole, and the phases of a program that uses the engine.

`python -m llmrs.bench.startup CONFIG SINCE` is the process with timed phases: CONFIG is JSON, SINCE its time.time() at
start. It prints the seconds since then at the end of each phase.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from llmrs.config import EngineConfig
from llmrs.core.errors import BackendError
from llmrs.core.options import SamplingParams

ROUNDS = 3  # after one warm-up of the file cache
PROMPT = "Hi"


@dataclass(frozen=True)
class StartupTimes:
    """Median seconds. `first_token` is the total of `llmrs run`; the others are phases of a program of its own."""

    first_token: float
    imported: float  # Python and all modules
    loaded: float  # the model, after that
    answered: float  # the first token, after that


def measure(config: EngineConfig, run: Sequence[str], rounds: int = ROUNDS) -> StartupTimes:
    """`run` is the command line of `llmrs run` with this config. Raises BackendError where a process fails."""
    command = [*run, "--prompts", PROMPT, "--max-tokens", "1", "--ignore-eos"]
    until_output(command)
    totals = [until_output(command) for _ in range(rounds)]
    phases = [*zip(*(time_phases(config) for _ in range(rounds)), strict=True)]
    return StartupTimes(statistics.median(totals), *map(statistics.median, phases))


def until_output(command: Sequence[str]) -> float:
    """Seconds until a process writes its first byte to stdout."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        _, errors = process.communicate()
    if process.returncode or not first:
        raise process_error(process.returncode, errors)
    return seconds


def time_phases(config: EngineConfig) -> tuple[float, float, float]:
    """Seconds of imports, loading and first token, in a new process."""
    command = [sys.executable, "-m", "llmrs.bench.startup", json.dumps(vars(config)), repr(time.time())]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise process_error(done.returncode, done.stderr)
    imported, loaded, answered = json.loads(done.stdout)
    return imported, loaded - imported, answered - loaded


def process_error(status: int, errors: bytes) -> BackendError:
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "nothing")
    return BackendError(f"a timed process ended with status {status}: {said}", "does `llmrs run` work?")


def main(config: EngineConfig, since: float) -> list[float]:
    """Seconds since `since` after each phase."""
    from llmrs.backends import base
    from llmrs.engine import Engine

    base.load_backend(base.resolve(config.backend))
    times = [time.time() - since]
    with Engine(config) as engine:
        times.append(time.time() - since)
        engine.generate_stream(SamplingParams(max_tokens=1, ignore_eos=True), PROMPT).result()
        times.append(time.time() - since)
    return times


if __name__ == "__main__":
    print(json.dumps(main(EngineConfig(**json.loads(sys.argv[1])), float(sys.argv[2]))))
