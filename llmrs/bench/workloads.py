"""The workloads of `llmrs bench`: their requests, as token ids; and what came of them, token by token.

All are sampled exactly at temperature 0.6, without filters, and run once before the run that counts. `mixed` draws what
nano-vllm's bench.py draws: prompts first, each its length before its tokens, then the lengths of the answers.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from llmrs.core.errors import ConfigError, did_you_mean
from llmrs.core.options import SamplingParams
from llmrs.core.request import Request
from llmrs.engine import Engine, OnUpdate
from llmrs.stream import Stream

HIGHEST = 10_000  # token id


@dataclass(frozen=True)
class Workload:
    """Requests that begin together; lengths in tokens are drawn from (shortest, longest)."""

    name: str
    requests: int
    prompt: tuple[int, int]
    new: tuple[int, int]

    def scaled(self, scale: float) -> "Workload":
        """A smaller one of the same form; an answer keeps the second token, before which there is nothing to time."""
        low, high = self.new
        least = min(low, 2)

        def less(n: int, least: int = 1) -> int:
            return max(round(n * scale), least)

        prompt = less(self.prompt[0]), less(self.prompt[1])
        return Workload(self.name, less(self.requests), prompt, (less(low, least), less(high, least)))

    def requests_of(self, vocabulary: int) -> "list[Asked]":
        """The same each time."""
        rng, top = random.Random(0), min(HIGHEST, vocabulary - 1)
        prompts = [[rng.randint(0, top) for _ in range(rng.randint(*self.prompt))] for _ in range(self.requests)]
        return [Asked(prompt, rng.randint(*self.new)) for prompt in prompts]

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return self.prompt[1] + self.new[1]

    @property
    def counts_prompts(self) -> bool:
        """Whether its rate is that of prompt tokens: there are no others to speak of."""
        return self.new[1] == 1


WORKLOADS = {
    w.name: w
    for w in (
        Workload("seed", 256, (16, 16), (1008, 1008)),
        Workload("mixed", 256, (100, 1024), (100, 1024)),
        Workload("single", 1, (128, 128), (512, 512)),
        Workload("prefill", 16, (4096, 4096), (1, 1)),
    )
}


def named(text: str, scale: float = 1.0) -> list[Workload]:
    """The workloads of a list such as "seed,mixed". Raises ConfigError for a name that is none of them."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WORKLOADS:
            raise ConfigError(f"workloads: {name!r} is not there", did_you_mean(name, WORKLOADS))
    return [WORKLOADS[name].scaled(scale) for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Asked:
    """One request: the prompt's token ids, and how many tokens its answer has."""

    prompt: list[int]
    new: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0.6, top_k=0, top_p=1.0, min_p=0.0, max_tokens=self.new, ignore_eos=True)


@dataclass(frozen=True)
class Answered:
    """When a request was submitted, and when each of its tokens came, in seconds of one clock."""

    submitted: float
    times: list[float] = field(default_factory=list)

    @property
    def to_first(self) -> float:
        return self.times[0] - self.submitted

    @property
    def gaps(self) -> list[float]:
        """Between one token and the next."""
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True)
class Outcome:
    """What came of the requests of a workload."""

    answers: list[Answered]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(a.times[-1] for a in self.answers) - min(a.submitted for a in self.answers)

    @property
    def tokens(self) -> int:
        return sum(len(a.times) for a in self.answers)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Seconds to the first token of a request, and from a token to the next, as percentiles."""
        gaps = [gap for a in self.answers for gap in a.gaps]
        found = {"first_token": percentiles([a.to_first for a in self.answers])}
        return {**found, "between_tokens": percentiles(gaps)} if gaps else found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The values that 50, 90 and 99 of 100 do not exceed."""
    ranked = sorted(values)
    return {f"p{p}": ranked[-(-p * len(ranked) // 100) - 1] for p in (50, 90, 99)}


def run(engine: Engine, asked: Sequence[Asked], due: Sequence[float] | None = None) -> Outcome:
    """Answers all requests, which begin at once, or `due` so many seconds after the beginning, in rising order."""
    answers: list[Answered] = []
    streams: list[Stream] = []
    begin = time.monotonic()
    for n, one in enumerate(asked):
        if due is not None:
            time.sleep(max(begin + due[n] - time.monotonic(), 0))
        answers.append(Answered(time.monotonic()))
        request = engine._inputs.request(one.params, one.prompt)
        streams.append(engine._start(request, around=partial(_noting, answers[-1].times)))
    for stream in streams:
        stream.result()
    return Outcome(answers)


def _noting(times: list[float], update: OnUpdate) -> OnUpdate:
    """`update`, which also notes when tokens come."""

    def noted(request: Request, tokens: list[int]) -> None:
        if tokens:
            times.append(time.monotonic())
        update(request, tokens)

    return noted


def arrivals(count: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests come, `rate` a second on average: the gaps of a Poisson process."""
    rng, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        found.append(at)
        at += rng.expovariate(rate)
    return found
