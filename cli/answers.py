"""The requests of one run: submission, records and throughput."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from llmrs.cli.options import RunOptions
from llmrs.core.errors import ContextLengthError, LlmrsError, RequestError
from llmrs.core.options import SamplingParams
from llmrs.models.text.message import Message
from llmrs.output import GenerationOutput
from llmrs.trace import union_length

if TYPE_CHECKING:
    from llmrs.engine import Engine
    from llmrs.inputs import Prompt
    from llmrs.stream import Stream

NOT_STARTED = GenerationOutput(-1, "", [], "cancelled", 0, 0, 0, 0.0, 0.0, 0.0)


class Answer:
    """One answer to a prompt: a stream, or the error that prevented it. Both, if the stream failed."""

    def __init__(self, number: int, prompt: str) -> None:
        self.number, self.prompt = number, prompt  # of the prompt, from 1
        self.stream: Stream | None = None
        self.error: LlmrsError | None = None
        self.submitted = 0.0

    def pieces(self) -> Iterator[str]:
        """The text as it is generated. A failure ends it and is kept in `error`."""
        try:
            yield from self.stream or ()
        except LlmrsError as error:
            self.error = error

    def wait(self) -> None:
        for _ in self.pieces():
            pass

    def output(self) -> GenerationOutput:
        if self.stream is not None:
            return self.stream.output()
        return replace(NOT_STARTED, finish_reason="error") if self.error else NOT_STARTED

    def record(self) -> dict[str, Any]:
        """The request as a JSON object; times are seconds."""
        fields = asdict(self.output())
        del fields["seq_id"]
        for name in ("logprobs", "prompt_logprobs"):
            if fields[name] is None:
                del fields[name]
        e = self.error
        error = e and {"type": type(e).__name__, "message": e.message, "hint": e.hint}
        return {"prompt": self.prompt, **fields, "error": error}


def submit(answers: Sequence[Answer], engine: "Engine", params: SamplingParams, run: RunOptions) -> None:
    """Submits the `params.n` answers to one prompt. A RequestError is kept in them; other errors are raised."""
    try:
        streams = engine.generate_streams(params, render(engine, run, answers[0].prompt))
        for answer, stream in zip(answers, streams, strict=True):
            answer.stream = stream
    except RequestError as error:
        too_long = isinstance(error, ContextLengthError)
        hint = f"shorten the prompt{longer_context(engine)}" if too_long else error.hint
        for answer in answers:
            answer.error = type(error)(error.message, hint)
    for answer in answers:
        answer.submitted = time.monotonic()


def cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if answer.stream is not None:
            answer.stream.cancel()


def longer_context(engine: "Engine") -> str:
    """End of a hint: the largest max_model_len that fits, if the context can be longer."""
    most = min(engine.memory_plan.max_len_one_seq, engine.memory_plan.model_max_len)
    return f", or raise max_model_len, to {most} at most" if most > engine.memory_plan.max_model_len else ""


def render(engine: "Engine", run: RunOptions, text: str) -> "Prompt":
    """The prompt through the model's chat template, unless the model has none or `chat` is false."""
    if not run.chat or engine.model.template is None:
        return text
    return engine.apply_chat_template([*system_message(run), Message("user", text)])


def system_message(run: RunOptions) -> list[Message]:
    return [] if run.system is None else [Message("system", run.system)]


def progress(answers: Sequence[Answer], since: float) -> str:
    running = sum(not a.stream.finished for a in answers if a.stream)
    tokens = sum(a.stream.token_count for a in answers if a.stream)
    rate = tokens / max(time.monotonic() - since, 1e-9)
    return f"{len(answers) - running} of {len(answers)} answered, {tokens} tokens, {rate:.1f} tokens/s"


def throughput_lines(answers: Sequence[Answer]) -> list[str]:
    """Tokens and wall-clock time of prefill and decode.

    Requests overlap, so their times do not add up. Prefill of a request lasts from its first step to its first token,
    decode from there to its end; the seconds are those during which at least one request was in that phase. A step may
    hold both, so the two phases may overlap.
    """
    outputs = [(a.submitted, a.output()) for a in answers if a.stream is not None]
    if not outputs:
        return []
    prefills, decodes = [], []
    for submitted, o in outputs:
        started = submitted + o.queue_time
        first_token = started + o.prompt_time
        prefills.append((started, first_token))
        decodes.append((first_token, first_token + o.decode_time))
    return [
        throughput("Prompt tokens", sum(o.prompt_length for _, o in outputs if o.index == 0), union_length(prefills)),
        throughput("Decoded tokens", sum(o.decoded_length for _, o in outputs), union_length(decodes)),
    ]


def throughput(name: str, tokens: int, seconds: float) -> str:
    return f"{name}: {tokens} in {seconds:.2f} s ({tokens / seconds if seconds > 0 else 0.0:.2f} tokens/s)"
