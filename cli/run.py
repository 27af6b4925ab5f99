"""`llmrs run`: answers the prompts of a config file."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmrs.cli.answers import Answer, figures, progress, start
from llmrs.cli.chat import converse
from llmrs.cli.flags import Values
from llmrs.cli.loading import load_engine
from llmrs.cli.options import SAME_FOR_ALL, RunOptions
from llmrs.cli.outputs import Records, check_outputs, encoded, records_file, traced
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.signals import on_interrupt
from llmrs.cli.streams import ReaderLeft, WriteError, require_stdout
from llmrs.cli.terminal import READER_LEFT, WRONG, StatusLine, note, report
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.engine import Engine

STREAMED = 8  # most answers of a run that are shown as they grow
UNSEEN = dict.fromkeys(("logprobs", "prompt_logprobs"), "add --json or --output FILE")


def run(config: str | None, flags: Values) -> int:
    """Answers the prompts of a config file, or of --prompts."""
    settings = load_settings(config, flags)
    if settings.run.interactive:
        return converse(settings)
    settings = settings.without(*SAME_FOR_ALL)
    if not settings.run.json and settings.run.output is None:
        settings = settings.without(UNSEEN, "text holds no log probabilities")
    prompts = settings.run.prompts
    if not prompts:
        raise ConfigError("there are no prompts", 'give --prompts "Hi | Bye", or talk to the model with `llmrs chat`')
    check_outputs(
        {name: getattr(settings.run, name) for name in ("output", "trace")}, settings.inputs, settings.engine.model_path
    )
    require_stdout(settings.run.output)
    groups = [[Answer(n, prompt) for _ in range(settings.sampling.n)] for n, prompt in enumerate(prompts, 1)]
    with load_engine(settings) as engine:
        check_template(engine, settings.run)
        return answered(engine, settings, groups)


def answered(engine: "Engine", settings: Settings, groups: Sequence[Sequence[Answer]]) -> int:
    """Answers groups of n answers to one prompt, and writes what is asked for; the exit status."""
    answers, options = [answer for group in groups for answer in group], settings.run
    with (
        records_file(options.output, len(answers)) as records,
        traced(engine, options.trace),
        on_interrupt(lambda: cancel(answers)) as stopped,
    ):
        for group in groups:
            if not stopped.status:
                start(group, engine, settings.sampling, options)
        if stopped.status:
            cancel(answers)  # again: the signal may have come in the middle of a start
        lost = follow(answers, options, records)
        for line in figures(answers):
            print(line, file=sys.stderr)
    wrong = WRONG if any(a.error for a in answers) else 0
    return (lost if lost != READER_LEFT else 0) or stopped.status or wrong or lost


def cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.cancel()


def check_template(engine: "Engine", options: RunOptions) -> None:
    """Says what happens where the model has no chat template. Raises ConfigError for a system message then."""
    if options.chat and engine.model.template is None:
        if options.system is not None:
            raise ConfigError("system: the model has no chat template", "leave out the system message")
        note("the model has no chat template: prompts are completed as plain text")


def follow(answers: Sequence[Answer], options: RunOptions, records: Records | None) -> int:
    """Waits for each answer in turn, prints it, and writes its record; the exit status for what can't be written.

    Where one of the two fails, all answers end early, and what is there so far goes to the other one.
    """
    screen, status = Screen(answers, options), 0
    for done, answer in enumerate(answers):
        try:
            screen.follow(answer)
        except ReaderLeft:
            status = status or READER_LEFT
            cancel(answers)
        except WriteError as error:
            report(WriteError(f"{error.message}; {done} of {len(answers)} answers were printed", error.hint))
            status = WRONG
            cancel(answers)
        answer.drain()
        try:
            if records is not None:
                records.write(answer.record())
        except WriteError as error:
            report(error)
            status, records = WRONG, None
            cancel(answers)
        if answer.error is not None:
            report(answer.error, f"prompt {answer.number}: " if len(answers) > 1 else "")
    return status


class Screen:
    """Answers on stdout. A few are shown as they grow; of many, their state is, and each when it is complete."""

    def __init__(self, answers: Sequence[Answer], options: RunOptions) -> None:
        self.answers, self.json = answers, options.json
        self.streaming = len(answers) <= STREAMED and not options.json
        self.line, self.since = StatusLine(), time.monotonic()

    def follow(self, answer: Answer) -> None:
        """Prints one answer, and returns at its end. Raises WriteError."""
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
            print(encoded(answer.record()), flush=True)
        elif answer.stream is not None:
            print("" if self.streaming else f"{quoted(answer.prompt)}\n{answer.output().text}", flush=True)
            if several:
                print(flush=True)


def quoted(prompt: str) -> str:
    """A prompt, marked as in an e-mail."""
    return "\n".join(f"> {line}" for line in prompt.splitlines())
