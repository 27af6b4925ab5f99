"""`llmrs run`: answers the prompts of a config file."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from llmrs.cli.answers import Answer, figures, progress, start
from llmrs.cli.chat import converse
from llmrs.cli.flags import Values
from llmrs.cli.loading import load_engine
from llmrs.cli.options import RunOptions
from llmrs.cli.settings import load_settings
from llmrs.cli.terminal import INTERRUPTED, StatusLine, note, on_interrupt, report
from llmrs.core.errors import ConfigError

if TYPE_CHECKING:
    from llmrs.engine import Engine

STREAMED = 8  # most answers of a run that are shown as they grow


def run(config: str | None, flags: Values) -> int:
    """Answers the prompts of a config file, or of --prompts."""
    settings = load_settings(config, flags)
    if settings.run.interactive:
        return converse(settings)
    prompts = settings.run.prompts
    if not prompts:
        raise ConfigError("there are no prompts", 'give --prompts "Hi | Bye", or talk to the model with `llmrs chat`')
    check_output("output", settings.run.output)
    check_output("trace", settings.run.trace)
    groups = [[Answer(n, prompt) for _ in range(settings.sampling.n)] for n, prompt in enumerate(prompts, 1)]
    answers = [answer for group in groups for answer in group]
    with load_engine(settings) as engine, results_file(settings.run.output) as results:
        check_template(engine, settings.run)
        with traced(engine, settings.run.trace), on_interrupt(lambda: cancel(answers)) as interrupted:
            for group in groups:
                if not interrupted.is_set():
                    start(group, engine, settings.sampling, settings.run)
            if interrupted.is_set():
                cancel(answers)  # again: Ctrl-C may have come in the middle of a start
            follow(answers, settings.run, results)
    for line in figures(answers):
        print(line, file=sys.stderr)
    return INTERRUPTED if interrupted.is_set() else 2 if any(a.error for a in answers) else 0


def cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.cancel()


def check_template(engine: "Engine", options: RunOptions) -> None:
    """Says what happens where the model has no chat template. Raises ConfigError for a system message then."""
    if options.chat and engine.model.template is None:
        if options.system is not None:
            raise ConfigError("system: the model has no chat template", "leave out the system message")
        note("the model has no chat template: prompts are completed as plain text")


def follow(answers: Sequence[Answer], options: RunOptions, results: TextIO | None) -> None:
    """Waits for each answer in turn. A few are shown as they grow; of many, the state is, and each when complete."""
    streaming = len(answers) <= STREAMED and not options.json
    line, since = StatusLine(), time.monotonic()
    for answer in answers:
        if streaming and len(answers) > 1 and answer.stream is not None:
            print(quoted(answer.prompt), flush=True)
        for piece in answer.pieces():
            if streaming:
                print(piece, end="", flush=True)
            else:
                line.show(lambda: progress(answers, since))
        line.clear()
        if results is not None:
            write_record(results, answer)
        if options.json:
            write_record(sys.stdout, answer)
        elif answer.stream is not None:
            print("" if streaming else f"{quoted(answer.prompt)}\n{answer.output().text}", flush=True)
            if len(answers) > 1:
                print(flush=True)
        if answer.error is not None:
            report(answer.error, f"prompt {answer.number}: " if len(answers) > 1 else "")


def quoted(prompt: str) -> str:
    """A prompt, marked as in an e-mail."""
    return "\n".join(f"> {line}" for line in prompt.splitlines())


def write_record(file: TextIO, answer: Answer) -> None:
    try:
        file.write(json.dumps(answer.record(), ensure_ascii=False) + "\n")
        file.flush()  # what is there survives whatever comes
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{file.name} can't be written: {error.strerror}", "is the disk full?") from error


def check_output(option: str, path: str | None) -> None:
    """Raises ConfigError for a place where no file can be, before a model is loaded for it."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ConfigError(f"{option}: {path} can't be written", "give a file in a folder that is there")


@contextmanager
def traced(engine: "Engine", path: str | None) -> Iterator[None]:
    """Writes a trace of the steps meanwhile, where one is asked for."""
    trace = None if path is None else engine.start_trace()
    yield
    if trace is not None and path is not None:
        trace.write(Path(path))


@contextmanager
def results_file(path: str | None) -> Iterator[TextIO | None]:
    """The open file, or None where none is asked for."""
    if path is None:
        yield None
        return
    try:
        # a lone surrogate comes out as \udc80, which is how JSON writes it
        file = open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise ConfigError(f"output: {path} can't be written: {error}", "give another file") from error
    with file:
        yield file
