"""Completes several plain texts at once: python examples/completion.py [MODEL] [TEXT ...]"""

import sys

from llmrs import Engine, EngineConfig, SamplingParams


def main(model: str = "demo", *texts: str) -> None:
    prompts = list(texts) or ["llmrs is", "The KV cache", "A token is"]
    with Engine(EngineConfig(model)) as engine:
        for prompt, output in zip(prompts, engine.generate_sync(SamplingParams(max_tokens=48), prompts), strict=True):
            print(f"{prompt}|{output.text}")
            print(f"  {output.decoded_length} tokens, {output.finish_reason}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
