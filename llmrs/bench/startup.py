"""From the start of a process to the first token: what `llmrs run` takes, and which part of it is what.

As a program (`python -m llmrs.bench.startup CONFIG SINCE`) it is the process that is timed for the parts: the config as
JSON, and the time.time() at which it was started. It prints the seconds since then after each part.
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

ROUNDS = 3  # after one that warms the file cache
PROMPT = "Hi"


@dataclass(frozen=True)
class Start:
    """Median seconds. `first_token` is that of `llmrs run`; the parts are those of a program that uses the engine."""

    first_token: float
    imported: float  # Python and all modules
    loaded: float  # the model, after that
    answered: float  # the first token, after that


def measure(config: EngineConfig, run: Sequence[str], rounds: int = ROUNDS) -> Start:
    """`run` is the command line of `llmrs run` with this config. Raises BackendError where a process fails."""
    command = [*run, "--prompts", PROMPT, "--max-tokens", "1", "--ignore-eos"]
    until_output(command)
    totals = [until_output(command) for _ in range(rounds)]
    parts = [stages(config) for _ in range(rounds)]
    imported, loaded, answered = (statistics.median(p[n] for p in parts) for n in range(3))
    return Start(statistics.median(totals), imported, loaded, answered)


def until_output(command: Sequence[str]) -> float:
    """Seconds until a process writes its first byte to stdout."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        _, errors = process.communicate()
    if process.returncode or not first:
        raise failed(process.returncode, errors)
    return seconds


def stages(config: EngineConfig) -> tuple[float, float, float]:
    """Seconds of importing, of loading, and of the first token, in a process of their own."""
    command = [sys.executable, "-m", "llmrs.bench.startup", json.dumps(vars(config)), repr(time.time())]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise failed(done.returncode, done.stderr)
    imported, loaded, answered = json.loads(done.stdout)
    return imported, loaded - imported, answered - loaded


def failed(status: int, errors: bytes) -> BackendError:
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    said = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "nothing")
    return BackendError(f"a process that was timed ended with status {status}: {said}", "does `llmrs run` work?")


def main(config: EngineConfig, since: float) -> list[float]:
    """What the timed process does."""
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
