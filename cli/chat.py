"""`llmrs chat`: a conversation in the terminal, or with a program that writes lines to a pipe."""

import sys
from typing import TYPE_CHECKING

from llmrs.cli.answers import figure, longer_context, system_message
from llmrs.cli.flags import Values
from llmrs.cli.loading import load_engine
from llmrs.cli.options import SAME_FOR_ALL, RunOptions
from llmrs.cli.outputs import check_outputs, traced
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.signals import INTERRUPTED, Terminated, on_interrupt
from llmrs.cli.streams import WriteError, expect_utf16
from llmrs.cli.terminal import WRONG, edit_lines, note, report
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
    "n": "use `llmrs run`: a conversation goes on with one answer",
    "logprobs": "use `llmrs run --json`",
    "prompt_logprobs": "use `llmrs run --json`",
}
COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/stats": "tokens and speed of the last answer, and tokens of the conversation",
    "/exit": "leave (so do Ctrl-C and the end of input)",
}


def chat(config: str | None, flags: Values) -> int:
    """Talks to a model. Type /help for what else can be typed."""
    if flags.get("interactive") is False:
        raise ConfigError("interactive: a chat is nothing else", "leave it out, or use `llmrs run`")
    return converse(load_settings(config, flags))


def converse(settings: Settings) -> int:
    run = settings.run
    if not run.chat:
        raise ConfigError("chat: false leaves no conversation to have", "leave it out, or use `llmrs run`")
    settings = settings.without(UNUSED, "a chat does not use it").without(*SAME_FOR_ALL)
    check_outputs({"trace": run.trace}, settings.inputs, settings.engine.model_path)
    with load_engine(settings) as engine:
        check_messages(engine, run)
        with traced(engine, run.trace):
            return Chat(engine, settings).loop()


def check_messages(engine: "Engine", run: RunOptions) -> None:
    """Tries the template before anything is typed. Raises RequestError, or ModelError where there is none."""
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
    """A conversation: what was said, and the loop that goes on with it."""

    def __init__(self, engine: "Engine", settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.messages = system_message(settings.run)
        self.last: GenerationOutput | None = None
        self.by_hand = sys.stdin.isatty()
        self.status = 0

    def loop(self) -> int:
        """Reads and answers until the input ends; the exit status."""
        if self.by_hand:
            edit_lines()
            print("/help says what can be typed", file=sys.stderr)
        while (line := self.read()) is not None:
            if line.startswith("/"):
                if line == "/exit":
                    break
                self.obey(line)
            elif self.by_hand and "\x1b" in line:  # where lines can't be edited
                report(RequestError("the line holds a key that is no character, such as an arrow", "type it again"))
            elif line and (signalled := self.answer(line)) and not (self.by_hand and signalled == INTERRUPTED):
                return signalled  # a pipe's next line is not what Ctrl-C asks for
        return self.status

    def read(self) -> str | None:
        """The next line without white space around it; None at the end. Lines that are pasted at once are one."""
        try:
            if self.by_hand and sys.stdout.isatty():
                return input("> ").strip()
            if self.by_hand:  # stdout goes to a file, where no prompt marks belong
                print("> ", end="", file=sys.stderr, flush=True)
            else:
                expect_utf16()
            line = sys.stdin.readline()
        except Terminated:
            raise
        except (EOFError, KeyboardInterrupt):
            line = ""
        except OSError as error:
            raise ConfigError(f"standard input can't be read: {error.strerror}", "give a pipe or a file") from error
        if not line and self.by_hand:
            print(file=sys.stderr)
        return line.strip() if line else None

    def obey(self, command: str) -> None:
        if command == "/help":
            for name, meaning in COMMANDS.items():
                print(f"{name:8}{meaning}", file=sys.stderr)
        elif command == "/clear":
            self.messages = system_message(self.settings.run)
        elif command == "/stats":
            self.print_stats()
        else:
            report(RequestError(f"there is no command {command}", did_you_mean(command, COMMANDS)))

    def answer(self, text: str) -> int:
        """Streams the answer and remembers both sides; the exit status of the signal that stopped it, else 0.

        An error costs only this turn.
        """
        turn = [*self.messages, Message("user", text)]
        try:
            stream = self.engine.generate_stream(self.settings.sampling, self.engine.apply_chat_template(turn))
            with on_interrupt(stream.cancel) as stopped:
                for piece in stream:
                    print(piece, end="", flush=True)
            print(flush=True)
        except (EngineClosedError, WriteError):
            raise
        except LlmrsError as error:
            full = isinstance(error, ContextLengthError)
            report(RequestError(error.message, self.room()) if full else error)
            self.status = WRONG
            return 0
        self.last = stream.output()
        self.messages = [*turn, Message("assistant", self.said(self.last))]
        return stopped.status

    def room(self) -> str:
        """What helps where the context is full."""
        forget = "/clear forgets the conversation" if self.messages else "say it in fewer words"
        return f"{forget}{longer_context(self.engine)}"

    def said(self, output: GenerationOutput) -> str:
        """The answer as the conversation goes on with it: without control tokens, which the template writes."""
        from llmrs.models.text.detokenize import Detokenizer  # not for --help, which it would slow down

        p = self.settings.sampling
        if p.skip_special_tokens:
            return output.text
        detokenizer = Detokenizer(self.engine.model.tokenizer, tuple(p.stop or ()), p.min_tokens)
        return "".join([*map(detokenizer.add, output.token_ids), detokenizer.flush()])

    def print_stats(self) -> None:
        if self.last is None:
            note("there is no answer yet")
            return
        o = self.last
        print(figure("Prompt tokens", o.prompt_length, o.prompt_time), f"({o.cached_tokens} cached)", file=sys.stderr)
        print(figure("Decoded tokens", o.decoded_length, o.decode_time), file=sys.stderr)
        print(f"Conversation: {o.prompt_length + o.decoded_length} tokens", file=sys.stderr)
