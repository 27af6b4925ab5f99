"""CPU overhead per step: scheduling, batch, commit and text, on a backend that computes nothing."""

import statistics
import time
from dataclasses import dataclass

import numpy as np

from llmrs.core.batch import Batch
from llmrs.core.blocks import BlockPool
from llmrs.core.engine import EngineCore
from llmrs.core.options import BUILT_IN, SamplingParams
from llmrs.core.request import Request
from llmrs.core.sampling import Logprobs
from llmrs.models.text.detokenize import Detokenizer
from llmrs.models.text.tokenizer import Tokenizer
from llmrs.stream import OutputQueue

PROMPT, STEPS, WARM_UP, BLOCK = 32, 400, 50, 16


@dataclass(frozen=True)
class NullOutput:
    result: np.ndarray

    def tokens(self) -> np.ndarray:
        return self.result

    def logprobs(self) -> Logprobs | None:
        return None


class NullBackend:
    """A backend whose tokens are drawn in advance."""

    max_in_flight = 1

    def __init__(self, num_seqs: int, vocab_size: int) -> None:
        self.drawn = np.random.default_rng(0).integers(0, vocab_size, (256, num_seqs)).astype(np.int32)
        self.steps = 0

    def launch(self, batch: Batch) -> NullOutput:
        self.steps += 1
        return NullOutput(self.drawn[self.steps % 256, : len(batch.req_slots)])

    def forward(self, batch: Batch) -> None:
        """Computes nothing."""

    def sample(self, logits: None, batch: Batch, mask: np.ndarray | None) -> NullOutput:
        return self.launch(batch)


def host_step(tokenizer: Tokenizer, running: int) -> float:
    """Median host seconds of a step of `running` requests, detokenization included."""
    vocab_size, length = tokenizer.vocab_size, PROMPT + STEPS + WARM_UP + 8
    pool = BlockPool(running * (-(-length // BLOCK) + 1), BLOCK)
    sizes = {"max_model_len": length, "max_num_seqs": running, "max_num_batched_tokens": max(2048, running)}
    core = EngineCore(NullBackend(running, vocab_size), pool, vocab_size=vocab_size, **sizes)
    for n in range(running):
        params = SamplingParams(max_tokens=length, temperature=0.8, top_p=0.95).over(BUILT_IN)
        request = Request([(n + i) % vocab_size for i in range(PROMPT)], params, n)
        request.on_update = OutputQueue(Detokenizer(tokenizer), core.cancel).on_update
        core.submit(request)
    while core.scheduler.stats["generated_tokens"] < running * WARM_UP:
        core.step()
    times = []
    for _ in range(STEPS - WARM_UP):
        begin = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
