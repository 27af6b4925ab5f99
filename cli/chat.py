"""`llmrs chat`: a conversation in the terminal, or line by line over a pipe."""

import sys
from typing import TYPE_CHECKING

from llmrs.cli.answers import longer_context, system_message, throughput
from llmrs.cli.flags import Flags
from llmrs.cli.loading import load_engine
from llmrs.cli.options import PER_REQUEST, RunOptions
from llmrs.cli.outputs import check_outputs, traced
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.signals import INTERRUPTED, Terminated, on_interrupt
from llmrs.cli.streams import WriteError, detect_utf16
from llmrs.cli.terminal import FAILED, enable_line_editing, note, print_error
from llmrs.core.errors import (
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    LlmrsError,
    ModelError,
    RequestError,
    did_you_mean,
)
from llmrs.models.text.message import Message
from llmrs.output import GenerationOutput

if TYPE_CHECKING:
    from llmrs.engine import Engine

UNUSED = {
    "prompts": "use `llmrs run`, or type them",
    "output": "use `llmrs run`",
    "json": "use `llmrs run`",
    "n": "use `llmrs run`: a conversation continues with one answer",
    "logprobs": "use `llmrs run --json`",
    "prompt_logprobs": "use `llmrs run --json`",
}
COMMANDS = {
    "/help": "list the commands",
    "/clear": "start a new conversation",
    "/stats": "tokens and speed of the last answer, length of the conversation",
    "/exit": "leave (also Ctrl-C, or end of input)",
}


def chat(config: str | None, flags: Flags) -> int:
    """Chat with a model. Type /help for the commands."""
    if flags.get("interactive") is False:
        raise ConfigError("interactive: a chat is always interactive", "leave it out, or use `llmrs run`")
    return converse(load_settings(config, flags))


def converse(settings: Settings) -> int:
    run = settings.run
    if not run.chat:
        raise ConfigError("chat: false: a conversation needs the chat template", "leave it out, or use `llmrs run`")
    settings = settings.without(UNUSED, "a chat does not use it").without(*PER_REQUEST)
    check_outputs({"trace": run.trace}, settings.inputs, settings.engine.model_path)
    with load_engine(settings) as engine:
        check_template(engine, run)
        with traced(engine, run.trace):
            return Chat(engine, settings).loop()


def check_template(engine: "Engine", run: RunOptions) -> None:
    """Renders a test message. Raises RequestError, or ModelError for a model without a chat template."""
    if engine.model.template is None:
        raise ModelError("a chat needs a chat template, and the model has none", "use `llmrs run` for plain text")
    question = Message("user", "Hi")
    try:
        engine.apply_chat_template([*system_message(run), question])
    except RequestError as error:
        if run.system is None:
            raise
        engine.apply_chat_template([question])
        raise RequestError(f"system: {error.message}", "leave the system message out") from error


class Chat:
    """The messages of a conversation, and its input loop."""

    def __init__(self, engine: "Engine", settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.messages = system_message(settings.run)
        self.last: GenerationOutput | None = None
        self.interactive = sys.stdin.isatty()
        self.status = 0

    def loop(self) -> int:
        """Answers each line of the input; returns the exit status."""
        if self.interactive:
            enable_line_editing()
            print("/help lists the commands", file=sys.stderr)
        while (line := self.read()) is not None:
            if line.startswith("/"):
                if line == "/exit":
                    break
                self.run_command(line)
            elif self.interactive and "\x1b" in line:  # without line editing
                print_error(RequestError("the line holds an escape sequence, as of an arrow key", "type it again"))
            elif line and (signalled := self.answer(line)) and not (self.interactive and signalled == INTERRUPTED):
                return signalled  # in a terminal Ctrl-C ends only the answer
        return self.status

    def read(self) -> str | None:
        """The next line, stripped; None at the end of input."""
        try:
            if self.interactive and sys.stdout.isatty():
                return input("> ").strip()
            if self.interactive:  # stdout is a file: the input mark goes to stderr
                print("> ", end="", file=sys.stderr, flush=True)
            else:
                detect_utf16()
            line = sys.stdin.readline()
        except Terminated:
            raise
        except (EOFError, KeyboardInterrupt):
            line = ""
        except OSError as error:
            raise ConfigError(f"standard input can't be read: {error.strerror}", "give a pipe or a file") from error
        if not line and self.interactive:
            print(file=sys.stderr)
        return line.strip() if line else None

    def run_command(self, command: str) -> None:
        if command == "/help":
            for name, meaning in COMMANDS.items():
                print(f"{name:8}{meaning}", file=sys.stderr)
        elif command == "/clear":
            self.messages = system_message(self.settings.run)
        elif command == "/stats":
            self.print_stats()
        else:
            print_error(RequestError(f"unknown command {command}", did_you_mean(command, COMMANDS)))

    def answer(self, text: str) -> int:
        """Streams the answer and extends the conversation; returns the exit status of a signal, else 0.

        An error ends only this answer.
        """
        messages = [*self.messages, Message("user", text)]
        try:
            stream = self.engine.generate_stream(self.settings.sampling, self.engine.apply_chat_template(messages))
            with on_interrupt(stream.cancel) as stop:
                for piece in stream:
                    print(piece, end="", flush=True)
            print(flush=True)
        except (EngineClosedError, WriteError):
            raise
        except LlmrsError as error:
            too_long = isinstance(error, ContextLengthError)
            print_error(RequestError(error.message, self.context_hint()) if too_long else error)
            self.status = FAILED
            return 0
        self.last = stream.output()
        self.messages = [*messages, Message("assistant", self.history_text(self.last))]
        return stop.status

    def context_hint(self) -> str:
        shorten = "/clear starts a new conversation" if self.messages else "shorten the message"
        return f"{shorten}{longer_context(self.engine)}"

    def history_text(self, output: GenerationOutput) -> str:
        """The answer without special tokens, which the template adds."""
        from llmrs.models.text.detokenize import Detokenizer  # imported here to keep `llmrs --help` fast

        p = self.settings.sampling
        if p.skip_special_tokens:
            return output.text
        detokenizer = Detokenizer(self.engine.model.tokenizer, tuple(p.stop or ()), p.min_tokens)
        return "".join([*map(detokenizer.add, output.token_ids), detokenizer.flush()])

    def print_stats(self) -> None:
        o = self.last
        if o is None:
            note("no answer yet")
            return
        prefill = throughput("Prompt tokens", o.prompt_length, o.prompt_time)
        print(f"{prefill} ({o.cached_tokens} cached)", file=sys.stderr)
        print(throughput("Decoded tokens", o.decoded_length, o.decode_time), file=sys.stderr)
        print(f"Conversation: {o.prompt_length + o.decoded_length} tokens", file=sys.stderr)
