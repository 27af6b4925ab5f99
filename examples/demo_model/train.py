"""Trains the bundled model from scratch: `python -m demo_model.train --out DIR --minutes 6.5`.

The text is made first, by worker processes; then AdamW takes steps for the time given, or for a number of steps.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from demo_model.corpus import END, END_OF_TEXT, START, documents
from demo_model.rows import VOCABULARY, Rows, gather, train_tokenizer

# Prefix-stable: a longer conversation begins with the text of the shorter one and its answer.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role: ' ~ message['role']) }}{%- endif %}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTEXT = 4096
LARGEST_FILE = 8_000_000  # bytes
WARMUP = 0.02  # part of the training
CLIP = 1.0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=0, help="train for so many steps, instead of for a time")
    parser.add_argument("--minutes", type=float, default=6.5, help="train for so long, without making the text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="rows of one step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--tokens", type=float, default=300, help="millions of tokens of text to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that make text")
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    return parser


def new_model() -> Qwen3ForCausalLM:
    """A Qwen3 with random weights; bf16 in a file it must stay below LARGEST_FILE."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    assert 2 * parameters(model) < LARGEST_FILE
    return model


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make_tokenizer(out: Path, seed: int) -> Path:
    """Trains the tokenizer and writes its files."""
    tokenizer = train_tokenizer(documents(f"tokenizer {seed}", 40_000))
    path = out / "tokenizer.json"
    tokenizer.save(str(path))
    assert [tokenizer.token_to_id(t) for t in (END_OF_TEXT, START, END)] == [0, 1, 2]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", settings)
    return path


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


@dataclass
class Batch:
    """What a step reads, on the device; (rows, length) unless it says otherwise."""

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor  # (rows, 1, length, length): a token sees the tokens of its document before it
    targets: torch.Tensor  # the next token, or -100


class Batches:
    """Draws rows at random; every row is drawn once before one is drawn twice."""

    def __init__(self, rows: Rows, size: int, seed: int, device: str) -> None:
        self.rows, self.size, self.device = rows, size, device
        self.random = np.random.default_rng(seed)
        self.order = np.zeros(0, np.int64)

    def next(self) -> Batch:
        while len(self.order) < self.size:
            self.order = np.concatenate([self.order, self.random.permutation(len(self.rows.tokens))])
        picked, self.order = self.order[: self.size], self.order[self.size :]
        arrays = (self.rows.tokens[picked], self.rows.document[picked], self.rows.trained[picked])
        tokens, document, trained = (torch.from_numpy(a.astype(np.int32)).to(self.device) for a in arrays)
        return batch(tokens.long(), document, trained.bool())


def batch(tokens: torch.Tensor, document: torch.Tensor, trained: torch.Tensor) -> Batch:
    length = tokens.shape[1]
    steps = torch.arange(length, device=tokens.device)
    first = torch.ones_like(trained)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    begins = torch.where(first, steps, 0).cummax(1).values
    mask = (document[:, None, :, None] == document[:, None, None, :]) & (steps[:, None] >= steps)
    targets = torch.full_like(tokens, -100)
    learned = trained[:, 1:] & ~first[:, 1:]
    targets[:, :-1] = torch.where(learned, tokens[:, 1:], -100)
    return Batch(tokens, steps - begins, mask, targets)


def optimizer(model: torch.nn.Module, rate: float, device: str) -> torch.optim.Optimizer:
    """AdamW that lets only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=device.startswith("cuda"))


def rate_at(progress: float) -> float:
    """The learning rate as a part of the highest: a short rise, then a cosine down to 0."""
    if progress < WARMUP:
        return max(progress, 1e-4) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


class Progress:
    """How much of the training is done: by steps where their number is given, else by time."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.seconds = steps, minutes * 60
        self.done, self.start = 0, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def part(self) -> float:
        # the first steps may take long (compilation), which must not use up the warm-up
        return self.done / self.steps if self.steps else min(self.elapsed() / self.seconds, self.done / 500)


def loss_of(model: Any, b: Batch, device: str) -> torch.Tensor:
    """Cross entropy per trained token."""
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        logits = model(input_ids=b.tokens, position_ids=b.positions, attention_mask=b.mask, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), b.targets.flatten())


def train(model: Qwen3ForCausalLM, batches: Batches, args: argparse.Namespace) -> dict[str, Any]:
    """Takes the steps. What it returns goes into the record."""
    run = torch.compile(model) if args.compile else model
    adam, progress = optimizer(model, args.rate, args.device), Progress(args.steps, args.minutes)
    losses: list[float] = []
    recent = torch.zeros((), device=args.device)
    every = 10 if args.steps and args.steps < 500 else 100
    while progress.part() < 1:
        for group in adam.param_groups:
            group["lr"] = args.rate * rate_at(progress.part())
        loss = loss_of(run, batches.next(), args.device)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        adam.zero_grad(set_to_none=True)
        recent += loss.detach()
        progress.done += 1
        if progress.done % every == 0:
            losses.append(recent.item() / every)
            recent.zero_()
            seconds = progress.elapsed()
            print(f"step {progress.done}: loss {losses[-1]:.4f}, {seconds:.0f} s, {progress.part():.1%}", flush=True)
    return {
        "steps": progress.done,
        "tokens": progress.done * args.rows * args.length,
        "seconds": round(progress.elapsed(), 1),
        "loss": round(losses[-1], 4) if losses else None,
    }


def save(model: Qwen3ForCausalLM, out: Path) -> None:
    """The weights in bf16, config.json and generation_config.json."""
    generation: Any = transformers.GenerationConfig
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    model.generation_config = generation(do_sample=True, temperature=0.6, top_k=20, eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(out)
    weights = out / "model.safetensors"
    weights.chmod(0o644)  # it is written for its owner only
    assert weights.stat().st_size <= LARGEST_FILE


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} (CPU)"


def versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "numpy": np}
    return {"python": platform.python_version(), **{name: str(m.__version__) for name, m in modules.items()}}


def record(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """How the model was made, for training.json."""
    return {
        "command": " ".join(["python -m demo_model.train", *sys.argv[1:]]),
        "seed": args.seed,
        "device": device_name(args.device),
        "versions": versions(),
        **found,
    }


def main() -> None:
    args = options().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    start = time.monotonic()
    path = make_tokenizer(args.out, args.seed)
    print(f"tokenizer: {time.monotonic() - start:.0f} s", flush=True)
    rows = gather(path, args.seed, args.length, args.workers, int(args.tokens * 1e6))
    made = round(time.monotonic() - start, 1)
    text_tokens = int((rows.document > 0).sum())
    print(f"text: {text_tokens:,} tokens in {len(rows.tokens):,} rows, {made:.0f} s", flush=True)
    model = new_model().to(args.device)
    print(f"parameters: {parameters(model):,}", flush=True)
    found = train(model, Batches(rows, args.rows, args.seed, args.device), args)
    save(model, args.out)
    about = {"parameters": parameters(model), "text_tokens": text_tokens, "text_seconds": made, **found}
    write_json(args.out / "training.json", record(args, about))


if __name__ == "__main__":
    main()
