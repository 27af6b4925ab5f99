"""The requests of one run: submitted, followed, and turned into records and figures."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from llmrs.cli.options import RunOptions
from llmrs.core.errors import ContextLengthError, LlmrsError, RequestError
from llmrs.core.options import SamplingParams
from llmrs.models.text.message import Message
from llmrs.output import GenerationOutput

if TYPE_CHECKING:
    from llmrs.engine import Engine
    from llmrs.inputs import Prompt
    from llmrs.stream import Stream

NOTHING = GenerationOutput(-1, "", [], "cancelled", 0, 0, 0, 0.0, 0.0, 0.0)  # of a request that never started


class Answer:
    """An answer to one prompt: a stream that may end in an error, or an error at once."""

    def __init__(self, number: int, prompt: str) -> None:
        self.number, self.prompt = number, prompt  # of the prompt; numbers count from 1
        self.stream: Stream | None = None
        self.error: LlmrsError | None = None
        self.submitted = 0.0

    def pieces(self) -> Iterator[str]:
        """The text as it comes. What ends it early is kept in `error`."""
        try:
            yield from self.stream or ()
        except LlmrsError as error:
            self.error = error

    def drain(self) -> None:
        """Waits for the end."""
        for _ in self.pieces():
            pass

    def cancel(self) -> None:
        if self.stream is not None:
            self.stream.cancel()

    @property
    def finished(self) -> bool:
        return self.stream is None or self.stream.finished

    @property
    def token_count(self) -> int:
        return self.stream.token_count if self.stream else 0

    def output(self) -> GenerationOutput:
        if self.stream is not None:
            return self.stream.output()
        return replace(NOTHING, finish_reason="error") if self.error else NOTHING

    def record(self) -> dict[str, Any]:
        """The request as a JSON object; times are seconds."""
        fields = asdict(self.output())
        asked = {"logprobs", "prompt_logprobs"}
        fields = {n: v for n, v in fields.items() if n != "seq_id" and not (n in asked and v is None)}
        error = self.error and {
            "type": type(self.error).__name__,
            "message": self.error.message,
            "hint": self.error.hint,
        }
        return {"prompt": self.prompt, **fields, "error": error}


def start(answers: Sequence[Answer], engine: "Engine", params: SamplingParams, run: RunOptions) -> None:
    """Starts the `params.n` answers to one prompt.

    A request that can't be served keeps its error; other errors concern every request and are raised.
    """
    try:
        streams = engine.generate_streams(params, render(engine, run, answers[0].prompt))
        for answer, stream in zip(answers, streams, strict=True):
            answer.stream = stream
    except ContextLengthError as error:
        fail(answers, ContextLengthError(error.message, f"shorten the prompt{longer_context(engine)}"))
    except RequestError as error:
        fail(answers, error)
    for answer in answers:
        answer.submitted = time.monotonic()


def fail(answers: Sequence[Answer], error: LlmrsError) -> None:
    for answer in answers:
        answer.error = error


def longer_context(engine: "Engine") -> str:
    """The end of a hint: that the context can be longer, where it can."""
    most = min(engine.memory_plan.max_len_one_seq, engine.memory_plan.model_max_len)
    return f", or raise max_model_len, to {most} at most" if most > engine.memory_plan.max_model_len else ""


def render(engine: "Engine", run: RunOptions, text: str) -> "Prompt":
    """The prompt as the model wants it: through its chat template, unless it has none or plain text is asked for."""
    if not run.chat or engine.model.template is None:
        return text
    return engine.apply_chat_template([*system_message(run), Message("user", text)])


def system_message(run: RunOptions) -> list[Message]:
    return [] if run.system is None else [Message("system", run.system)]


def progress(answers: Sequence[Answer], since: float) -> str:
    """The state of a batch in one line."""
    done, tokens = sum(a.finished for a in answers), sum(a.token_count for a in answers)
    rate = tokens / max(time.monotonic() - since, 1e-9)
    return f"{done} of {len(answers)} answered, {tokens} tokens, {rate:.1f} tokens/s"


def figures(answers: Sequence[Answer]) -> list[str]:
    """What was computed, in how much time.

    Requests overlap, so their own times must not be added up. A request's prompt phase lasts from its first step
    to its first token, its decode phase from there to its end; the seconds are those of the wall clock during
    which at least one request was in that phase. In a batch both phases can go on at once (one step decodes some
    requests and reads the prompts of others), so the two figures may overlap.
    """
    outputs = [(a.submitted, a.output()) for a in answers if a.stream is not None]
    if not outputs:
        return []
    prompts, decodes = [], []
    for submitted, o in outputs:
        started = submitted + o.queue_time
        first = started + o.prompt_time
        prompts.append((started, first))
        decodes.append((first, first + o.decode_time))
    return [
        figure("Prompt tokens", sum(o.prompt_length for _, o in outputs if o.index == 0), union(prompts)),
        figure("Decoded tokens", sum(o.decoded_length for _, o in outputs), union(decodes)),
    ]


def figure(name: str, tokens: int, seconds: float) -> str:
    return f"{name}: {tokens} in {seconds:.2f} s ({tokens / seconds if seconds > 0 else 0.0:.2f} tokens/s)"


def union(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of the time line that (begin, end) intervals cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total
