"""What the type of the KV cache costs: python tests/tools/perplexity.py [TEXTS [DTYPE]]

Prints the bundled model's perplexity on held-out conversations for each type of the KV cache: of its answers, and of
all tokens. What users say was not trained, so that the second is large, and far more sensitive.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
from demo_model.corpus import END, START, held_out_conversations, render
from demo_model.packing import answer_mask

from llmrs import Engine, EngineConfig, SamplingParams

LONGEST = 1024  # tokens of a text; what is beyond is not read


class Perplexity(NamedTuple):
    """Of the answers' tokens, and of all tokens but the first of a text."""

    answers: float
    all: float
    tokens: int


def perplexity(texts: int, **config: object) -> Perplexity:
    """On `texts` conversations. `config` is the engine's."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    with Engine(EngineConfig(**config)) as engine:
        encode = engine.model.tokenizer.encode
        prompts = [encode(render(c)) for c in held_out_conversations(texts)]
        outputs = engine.generate_sync(params, [p[:LONGEST] for p in prompts])
    header, (end,) = encode(f"{START}assistant\n"), encode(END)
    marks = np.concatenate([answer_mask(np.array(p), header, end)[1:LONGEST] for p in prompts])
    logs = np.array([p.logprob for o in outputs for p in o.prompt_logprobs[1:]])
    return Perplexity(math.exp(-logs[marks].mean()), math.exp(-logs.mean()), len(logs))


def main() -> None:
    texts, dtype = [*sys.argv[1:], *("200", "f32")[len(sys.argv) - 1 :]]
    exact = perplexity(int(texts), dtype=dtype, kv_cache_dtype="f32")
    print(f"{texts} conversations, {exact.tokens:,} tokens, computed in {dtype}")
    for kv in ("f32", "bf16", "f16", "fp8"):
        found = exact if kv == "f32" else perplexity(int(texts), dtype=dtype, kv_cache_dtype=kv)
        more = [100 * (a / b - 1) for a, b in zip(found[:2], exact[:2], strict=True)]
        print(
            f"KV cache {kv:4}: answers {found.answers:.5f} ({more[0]:+.3f} %), all {found.all:.3f} ({more[1]:+.3f} %)",
            flush=True,
        )


if __name__ == "__main__":
    main()
