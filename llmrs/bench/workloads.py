"""The workloads of `llmrs bench`: their requests as token ids, and the time of each output token.

All sample at temperature 0.6 without filters, and run once to warm up. `mixed` draws the lengths and tokens of
nano-vllm's bench.py in its order: for each prompt its length and tokens, then all output lengths.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise

from llmrs.core.errors import ConfigError, did_you_mean
from llmrs.core.options import SamplingParams
from llmrs.core.request import Request
from llmrs.engine import Engine
from llmrs.stream import Stream

MAX_TOKEN_ID = 10_000


@dataclass(frozen=True)
class RequestSpec:
    """Token ids of a prompt, and the number of output tokens."""

    prompt: list[int]
    output_len: int

    @property
    def params(self) -> SamplingParams:
        new = self.output_len
        return SamplingParams(temperature=0.6, top_k=0, top_p=1.0, min_p=0.0, max_tokens=new, ignore_eos=True)


@dataclass(frozen=True)
class Workload:
    """Requests that start together; lengths are tokens, drawn from (min, max)."""

    name: str
    requests: int
    prompt_len: tuple[int, int]
    output_len: tuple[int, int]

    def scaled(self, scale: float) -> "Workload":
        """A smaller workload of the same form; outputs keep a second token, or there is no ITL."""
        low, high = self.output_len

        def scaled(n: int, minimum: int = 1) -> int:
            return max(round(n * scale), minimum)

        prompt_len = scaled(self.prompt_len[0]), scaled(self.prompt_len[1])
        output_len = scaled(low, min(low, 2)), scaled(high, min(low, 2))
        return Workload(self.name, scaled(self.requests), prompt_len, output_len)

    def make_requests(self, vocab_size: int) -> list[RequestSpec]:
        """The same requests each time."""
        rng, top = random.Random(0), min(MAX_TOKEN_ID, vocab_size - 1)
        prompts = [[rng.randint(0, top) for _ in range(rng.randint(*self.prompt_len))] for _ in range(self.requests)]
        return [RequestSpec(prompt, rng.randint(*self.output_len)) for prompt in prompts]

    @property
    def max_len(self) -> int:
        """Tokens of the longest context."""
        return self.prompt_len[1] + self.output_len[1]

    @property
    def is_prefill(self) -> bool:
        """Whether the rate counts prompt tokens: outputs have one token."""
        return self.output_len[1] == 1


WORKLOADS = {
    w.name: w
    for w in (
        Workload("seed", 256, (16, 16), (1008, 1008)),
        Workload("mixed", 256, (100, 1024), (100, 1024)),
        Workload("single", 1, (128, 128), (512, 512)),
        Workload("prefill", 16, (4096, 4096), (1, 1)),
    )
}


def parse_workloads(text: str, scale: float = 1.0) -> list[Workload]:
    """The workloads of a list such as "seed,mixed". Raises ConfigError for an unknown name."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WORKLOADS:
            raise ConfigError(f"workloads: {name!r} is unknown", did_you_mean(name, WORKLOADS))
    return [WORKLOADS[name].scaled(scale) for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class RequestTimes:
    """Arrival of a request and of each output token, in seconds of time.monotonic()."""

    arrival_time: float
    token_times: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.arrival_time

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies."""
        return [after - before for before, after in pairwise(self.token_times)]


@dataclass(frozen=True)
class RunResult:
    requests: list[RequestTimes]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(r.token_times[-1] for r in self.requests) - min(r.arrival_time for r in self.requests)

    @property
    def tokens(self) -> int:
        return sum(len(r.token_times) for r in self.requests)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Percentiles of TTFT and ITL in seconds."""
        found = {"ttft": percentiles([r.ttft for r in self.requests])}
        itl = [gap for r in self.requests for gap in r.itl]
        return {**found, "itl": percentiles(itl)} if itl else found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 by nearest rank."""
    ranked = sorted(values)
    return {f"p{p}": ranked[-(-p * len(ranked) // 100) - 1] for p in (50, 90, 99)}


def run(engine: Engine, specs: Sequence[RequestSpec], arrivals: Sequence[float] | None = None) -> RunResult:
    """Runs all requests, from now on or at rising `arrivals` in seconds from now."""
    times: list[RequestTimes] = []
    streams: list[Stream] = []
    begin = time.monotonic()
    for n, spec in enumerate(specs):
        if arrivals is not None:
            time.sleep(max(begin + arrivals[n] - time.monotonic(), 0))
        times.append(RequestTimes(time.monotonic()))
        stream = engine._stream(engine._inputs.request(spec.params, spec.prompt))
        stream.request.on_update = partial(_record, times[-1].token_times, stream.request.on_update)
        engine._submit([stream])
        streams.append(stream)
    for stream in streams:
        stream.result()
    return RunResult(times)


def _record(times: list[float], on_update: Callable[..., None], request: Request, tokens: list[int]) -> None:
    if tokens:
        times.append(time.monotonic())
    on_update(request, tokens)


def poisson_arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Arrival times in seconds of a Poisson process of `rate` requests per second."""
    rng = random.Random(seed)
    return list(accumulate((rng.expovariate(rate) for _ in range(count - 1)), initial=0.0))
