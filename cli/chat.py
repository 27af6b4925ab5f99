"""`llmrs chat`: a conversation in the terminal, or with a program that writes lines to a pipe."""

import sys
from typing import TYPE_CHECKING

from llmrs.cli.answers import figure, system_message
from llmrs.cli.flags import Values
from llmrs.cli.loading import load_engine
from llmrs.cli.settings import Settings, load_settings
from llmrs.cli.terminal import INTERRUPTED, note, on_interrupt, report
from llmrs.core.errors import ConfigError, EngineClosedError, LlmrsError, RequestError, did_you_mean
from llmrs.models.message import Message
from llmrs.output import GenerationOutput

if TYPE_CHECKING:
    from llmrs.engine import Engine

COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/stats": "tokens and speed of the last answer, and tokens of the conversation",
    "/exit": "leave (so do Ctrl-C and the end of input)",
}


def chat(config: str | None, flags: Values) -> int:
    """Talks to a model. Type /help for what else can be typed."""
    return converse(load_settings(config, flags))


def converse(settings: Settings) -> int:
    run = settings.run
    if not run.chat:
        raise ConfigError("chat: false leaves no conversation to have", "leave it out, or use `llmrs run`")
    unused = [name for name in ("prompts", "output", "json") if getattr(run, name)]
    with load_engine(settings) as engine:
        engine.apply_chat_template([*system_message(run), Message("user", "Hi")])  # a bad template shows up here
        if unused:
            note(f"a chat does not use {', '.join(unused)}")
        return Chat(engine, settings).loop()


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
            print("/help says what can be typed", file=sys.stderr)
        while (line := self.read()) is not None:
            if line.startswith("/"):
                if line == "/exit":
                    break
                self.obey(line)
            elif line and self.answer(line) and not self.by_hand:
                return INTERRUPTED  # a pipe's next line is not what Ctrl-C asks for
        return self.status

    def read(self) -> str | None:
        """The next line without white space around it; None at the end."""
        try:
            if self.by_hand and sys.stdout.isatty():
                return input("> ").strip()
            if self.by_hand:  # stdout goes to a file, where no prompt marks belong
                print("> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            line = ""
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

    def answer(self, text: str) -> bool:
        """Streams the answer and remembers both sides; whether Ctrl-C stopped it. An error costs only this turn."""
        turn = [*self.messages, Message("user", text)]
        try:
            stream = self.engine.generate_stream(self.settings.sampling, self.engine.apply_chat_template(turn))
            with on_interrupt(stream.cancel) as interrupted:
                for piece in stream:
                    print(piece, end="", flush=True)
            print(flush=True)
        except EngineClosedError:
            raise
        except LlmrsError as error:
            report(error)
            self.status = 2
            return False
        self.last = stream.output()
        self.messages = [*turn, Message("assistant", self.said(self.last))]
        return interrupted.is_set()

    def said(self, output: GenerationOutput) -> str:
        """The answer as the conversation goes on with it: without control tokens, which the template writes."""
        from llmrs.models.detokenize import Detokenizer  # not for --help, which it would slow down

        p = self.settings.sampling
        if p.skip_special_tokens:
            return output.text
        detokenizer = Detokenizer(self.engine.model.tokenizer, tuple(p.stop or ()), p.min_tokens)
        return "".join([*map(detokenizer.push, output.token_ids), detokenizer.flush()])

    def print_stats(self) -> None:
        if self.last is None:
            note("there is no answer yet")
            return
        o = self.last
        print(figure("Prompt tokens", o.prompt_length, o.prompt_time), f"({o.cached_tokens} cached)", file=sys.stderr)
        print(figure("Decoded tokens", o.decoded_length, o.decode_time), file=sys.stderr)
        print(f"Conversation: {o.prompt_length + o.decoded_length} tokens", file=sys.stderr)
