"""The engine against transformers on the CPU, in one run, on the same checkpoint: python tests/bench_cpu.py [FOLDER]

One request: decode rate after a prompt of 32 tokens, and prefill of 512 tokens; bf16, greedy. Both take turns, and
the best of each counts, so that what else the machine does hits both.
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import random_checkpoint
import torch
import transformers

from llmrs import Engine, EngineConfig, SamplingParams

ROUNDS, NEW, PROMPT, PREFILL = 3, 48, 32, 512


def ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, 150_000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def resident() -> int:
    """Anonymous memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


class Theirs:
    """transformers, its static settings as they come."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def prefill(self, tokens: list[int]) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            self.model(torch.tensor([tokens]), logits_to_keep=1)
        return time.perf_counter() - begin

    def decode(self, tokens: list[int], count: int) -> float:
        """Seconds for `count` tokens after the first."""
        with torch.inference_mode():
            out = self.model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
            begin = time.perf_counter()
            for _ in range(count):
                token = out.logits[:, -1:].argmax(-1)
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - begin


class Ours:
    def __init__(self, folder: Path) -> None:
        config = EngineConfig(str(folder), device="cpu", max_model_len=1024, max_num_seqs=1, prefix_cache=False)
        before = resident()
        self.engine = Engine(config)
        gc.collect()
        fit = self.engine.fit
        print(f"anonymous memory {(resident() - before) / 1e9:.3f} GB after load; weights {fit.weights / 1e9:.3f} GB, ")
        print(f"KV cache {fit.blocks * fit.block_size * fit.token / 1e9:.3f} GB")

    def run(self, tokens: list[int], count: int) -> tuple[float, float]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        (output,) = self.engine.generate_sync(params, [tokens])
        return output.prompt_time, output.decode_time

    def prefill(self, tokens: list[int]) -> float:
        return self.run(tokens, 1)[0]

    def decode(self, tokens: list[int], count: int) -> float:
        return self.run(tokens, count + 1)[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else random_checkpoint.write("qwen3-0.6b", Path(temporary))
        ours, theirs = Ours(folder), Theirs(folder)
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores")
        best: dict[tuple[str, str], float] = {}
        for n in range(ROUNDS):
            for name, engine in (("llmrs", ours), ("transformers", theirs)):
                for what, seconds in (
                    ("decode", engine.decode(ids(PROMPT, n), NEW)),
                    ("prefill", engine.prefill(ids(PREFILL, n))),
                ):
                    best[what, name] = min(best.get((what, name), 1e9), seconds)
        for what, count in (("decode", NEW), ("prefill", PREFILL)):
            rates = [count / best[what, name] for name in ("llmrs", "transformers")]
            print(f"{what}: llmrs {rates[0]:.1f} tokens/s, transformers {rates[1]:.1f}: {rates[0] / rates[1]:.2f}x")
        ours.engine.close()


if __name__ == "__main__":
    main()
