"""Trains the bundled model from scratch: `python -m demo_model.train --out DIR --minutes 6.5`.

Worker processes make the text first. AdamW then trains for a time or for a number of steps.
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
from demo_model.packing import VOCAB_SIZE, Packed, make_dataset, train_tokenizer

# Prefix-stable: the prompt of the next turn starts with this prompt and its answer.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role: ' ~ message['role']) }}{%- endif %}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONTEXT = 4096
MAX_WEIGHT_BYTES = 8_000_000
WARMUP = 0.02  # fraction of the training
MAX_GRAD_NORM = 1.0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=0, help="training steps, instead of --minutes")
    parser.add_argument("--minutes", type=float, default=6.5, help="training time, without making the text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64, help="sequences per step")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--tokens", type=float, default=300, help="millions of tokens of text to make")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that make text")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    return parser


def new_model() -> Qwen3ForCausalLM:
    """A randomly initialized Qwen3, below MAX_WEIGHT_BYTES in bf16."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
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
    assert 2 * num_parameters(model) < MAX_WEIGHT_BYTES
    return model


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def make_tokenizer(out: Path, seed: int) -> Path:
    """Trains the tokenizer and writes its files. Returns tokenizer.json."""
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
    """Inputs of a step, on the device, (batch, length) unless noted."""

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor  # (batch, 1, length, length): causal within a document
    targets: torch.Tensor  # next token, or -100


class Batches:
    """Random batches, in epochs: every sequence once per epoch."""

    def __init__(self, data: Packed, size: int, seed: int, device: str) -> None:
        self.data, self.size, self.device = data, size, device
        self.random = np.random.default_rng(seed)
        self.order = np.zeros(0, np.int64)

    def next(self) -> Batch:
        while len(self.order) < self.size:
            self.order = np.concatenate([self.order, self.random.permutation(len(self.data.tokens))])
        picked, self.order = self.order[: self.size], self.order[self.size :]
        arrays = (self.data.tokens[picked], self.data.document[picked], self.data.loss_mask[picked])
        tokens, document, loss_mask = (torch.from_numpy(a.astype(np.int32)).to(self.device) for a in arrays)
        return batch(tokens.long(), document, loss_mask.bool())


def batch(tokens: torch.Tensor, document: torch.Tensor, loss_mask: torch.Tensor) -> Batch:
    length = tokens.shape[1]
    index = torch.arange(length, device=tokens.device)
    first = torch.ones_like(loss_mask)
    first[:, 1:] = document[:, 1:] != document[:, :-1]
    begins = torch.where(first, index, 0).cummax(1).values
    mask = (document[:, None, :, None] == document[:, None, None, :]) & (index[:, None] >= index)
    targets = torch.full_like(tokens, -100)
    learned = loss_mask[:, 1:] & ~first[:, 1:]
    targets[:, :-1] = torch.where(learned, tokens[:, 1:], -100)
    return Batch(tokens, index - begins, mask, targets)


def optimizer(model: torch.nn.Module, rate: float, device: str) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=device.startswith("cuda"))


def lr_schedule(progress: float) -> float:
    """Learning rate as a fraction of the peak: linear warmup, then cosine decay to 0."""
    if progress < WARMUP:
        return max(progress, 1e-4) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


class Progress:
    """Completed fraction of the training, by steps if their number is given, else by time."""

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps, self.seconds = steps, minutes * 60
        self.done, self.start = 0, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def fraction(self) -> float:
        # slow first steps (compilation) must not use up the warmup
        return self.done / self.steps if self.steps else min(self.elapsed() / self.seconds, self.done / 500)


def loss_of(model: Any, b: Batch, device: str) -> torch.Tensor:
    """Mean cross entropy of the target tokens."""
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
        logits = model(input_ids=b.tokens, position_ids=b.positions, attention_mask=b.mask, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), b.targets.flatten())


def train(model: Qwen3ForCausalLM, batches: Batches, args: argparse.Namespace) -> dict[str, Any]:
    """Trains. Returns figures for training.json."""
    run = torch.compile(model) if args.compile else model
    adam, progress = optimizer(model, args.rate, args.device), Progress(args.steps, args.minutes)
    losses: list[float] = []
    recent = torch.zeros((), device=args.device)
    every = 10 if args.steps and args.steps < 500 else 100
    while progress.fraction() < 1:
        for group in adam.param_groups:
            group["lr"] = args.rate * lr_schedule(progress.fraction())
        loss = loss_of(run, batches.next(), args.device)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        adam.step()
        adam.zero_grad(set_to_none=True)
        recent += loss.detach()
        progress.done += 1
        if progress.done % every == 0:
            losses.append(recent.item() / every)
            recent.zero_()
            seconds = progress.elapsed()
            print(
                f"step {progress.done}: loss {losses[-1]:.4f}, {seconds:.0f} s, {progress.fraction():.1%}", flush=True
            )
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
    weights.chmod(0o644)  # save_pretrained writes 0600
    assert weights.stat().st_size <= MAX_WEIGHT_BYTES


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} (CPU)"


def versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "numpy": np}
    return {"python": platform.python_version(), **{name: str(m.__version__) for name, m in modules.items()}}


def record(args: argparse.Namespace, figures: dict[str, Any]) -> dict[str, Any]:
    """The contents of training.json."""
    return {
        "command": " ".join(["python -m demo_model.train", *sys.argv[1:]]),
        "seed": args.seed,
        "device": device_name(args.device),
        "versions": versions(),
        **figures,
    }


def main() -> None:
    args = options().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    start = time.monotonic()
    path = make_tokenizer(args.out, args.seed)
    print(f"tokenizer: {time.monotonic() - start:.0f} s", flush=True)
    data = make_dataset(path, args.seed, args.length, args.workers, int(args.tokens * 1e6))
    made = round(time.monotonic() - start, 1)
    text_tokens = int((data.document > 0).sum())
    print(f"text: {text_tokens:,} tokens in {len(data.tokens):,} sequences, {made:.0f} s", flush=True)
    model = new_model().to(args.device)
    print(f"parameters: {num_parameters(model):,}", flush=True)
    figures = train(model, Batches(data, args.rows, args.seed, args.device), args)
    save(model, args.out)
    about = {"parameters": num_parameters(model), "text_tokens": text_tokens, "text_seconds": made, **figures}
    write_json(args.out / "training.json", record(args, about))


if __name__ == "__main__":
    main()
