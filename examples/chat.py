"""A conversation: python examples/chat.py [MODEL]. Ctrl-C stops an answer, end of input the program."""

import sys

from llmrs import Engine, EngineConfig, LlmrsError, Message, SamplingParams


def main(model: str = "demo") -> None:
    messages: list[Message] = []
    with Engine(EngineConfig(model)) as engine:
        for line in sys.stdin:
            turn = [*messages, Message("user", line.strip())]
            try:
                stream = engine.generate_stream(SamplingParams(max_tokens=512), engine.apply_chat_template(turn))
                for text in stream:
                    print(text, end="", flush=True)
            except KeyboardInterrupt:
                stream.cancel()
            except LlmrsError as error:  # the next turn may succeed
                print(f"error: {error}", file=sys.stderr)
                continue
            print()
            messages = [*turn, Message("assistant", stream.output().text)]


if __name__ == "__main__":
    main(*sys.argv[1:])
