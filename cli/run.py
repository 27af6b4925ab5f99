"""`llmrs run`: answers the prompts of a config file."""

import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from llmrs.cli.answers import Answer, cancel, progress, submit, throughput_lines
from llmrs.cli.chat import converse
from llmrs.cli.flags import Flags
from llmrs.cli.loading import load_engine
from llmrs.cli.options import PER_REQUEST, RunOptions
from llmrs.cli.outputs import JsonlFile, check_outputs, to_json, traced
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.signals import on_interrupt
from llmrs.cli.streams import ReaderClosed, WriteError, require_stdout
from llmrs.cli.terminal import FAILED, READER_CLOSED, StatusLine, note, print_error
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.engine import Engine

MAX_STREAMED = 8  # answers of a run that are streamed
JSON_ONLY = dict.fromkeys(("logprobs", "prompt_logprobs"), "add --json or --output FILE")


def run(config: str | None, flags: Flags) -> int:
    """Answer the prompts of a config file, or of --prompts."""
    settings = load_settings(config, flags)
    options = settings.run
    if options.interactive:
        return converse(settings)
    settings = settings.without(*PER_REQUEST)
    if not options.json and options.output is None:
        settings = settings.without(JSON_ONLY, "text holds no log probabilities")
    if not options.prompts:
        raise ConfigError("no prompts", 'give --prompts "Hi | Bye", or use `llmrs chat`')
    outputs = {"output": options.output, "trace": options.trace}
    check_outputs(outputs, settings.inputs, settings.engine.model_path)
    require_stdout(options.output)
    groups = [[Answer(n, prompt) for _ in range(settings.sampling.n)] for n, prompt in enumerate(options.prompts, 1)]
    with load_engine(settings) as engine:
        check_template(engine, options)
        return generate(engine, settings, groups)


def generate(engine: "Engine", settings: Settings, groups: Sequence[Sequence[Answer]]) -> int:
    """Answers groups of n answers to one prompt; returns the exit status."""
    answers, options = [answer for group in groups for answer in group], settings.run
    with (
        nullcontext() if options.output is None else closing(JsonlFile(options.output, len(answers))) as file,
        traced(engine, options.trace),
        on_interrupt(lambda: cancel(answers)) as stop,
    ):
        for group in groups:
            if not stop.status:
                submit(group, engine, settings.sampling, options)
        if stop.status:
            cancel(answers)  # again: the signal may have arrived during submit
        write_status = write_answers(answers, options, file)
        for line in throughput_lines(answers):
            print(line, file=sys.stderr)
    failed = FAILED if any(a.error for a in answers) else 0
    return (write_status if write_status == FAILED else 0) or stop.status or failed or write_status


def check_template(engine: "Engine", options: RunOptions) -> None:
    """A note for a model without a chat template; ConfigError if there is a system message."""
    if options.chat and engine.model.template is None:
        if options.system is not None:
            raise ConfigError("system: the model has no chat template", "leave out the system message")
        note("the model has no chat template: prompts are completed as plain text")


def write_answers(answers: Sequence[Answer], options: RunOptions, file: JsonlFile | None) -> int:
    """Prints each answer in order and writes its record; returns the exit status for failed writes.

    If one destination fails, all answers are cancelled, and the other one gets the tokens generated so far.
    """
    printer, status = Printer(answers, options), 0
    for printed, answer in enumerate(answers):
        try:
            printer.print(answer)
        except ReaderClosed:
            status = status or READER_CLOSED
            cancel(answers)
        except WriteError as error:
            message = f"{error.message}; {printed} of {len(answers)} answers were printed"
            print_error(WriteError(message, error.hint))
            status = FAILED
            cancel(answers)
        answer.wait()
        try:
            if file is not None:
                file.write(answer.record())
        except WriteError as error:
            print_error(error)
            status, file = FAILED, None
            cancel(answers)
        if answer.error is not None:
            print_error(answer.error, f"prompt {answer.number}: " if len(answers) > 1 else "")
    return status


class Printer:
    """Answers on stdout: streamed if they are few, otherwise each when it is complete, with a status line."""

    def __init__(self, answers: Sequence[Answer], options: RunOptions) -> None:
        self.answers, self.json = answers, options.json
        self.streaming = len(answers) <= MAX_STREAMED and not options.json
        self.line, self.since = StatusLine(), time.monotonic()

    def print(self, answer: Answer) -> None:
        """Prints one answer to its end. Raises WriteError."""
        several = len(self.answers) > 1
        if self.streaming and several and answer.stream is not None:
            print(quoted(answer.prompt), flush=True)
        for piece in answer.pieces():
            if self.streaming:
                print(piece, end="", flush=True)
            else:
                self.line.show(lambda: progress(self.answers, self.since))
        self.line.clear()
        if self.json:
            print(to_json(answer.record()), flush=True)
        elif answer.stream is not None:
            print("" if self.streaming else f"{quoted(answer.prompt)}\n{answer.output().text}", flush=True)
            if several:
                print(flush=True)


def quoted(prompt: str) -> str:
    """A prompt with `> ` before each line."""
    return "\n".join(f"> {line}" for line in prompt.splitlines())
