"""Evaluates the bundled model: `python -m demo_model.evaluate DIR` writes DIR/REPORT.md."""

import argparse
import json
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model.arithmetic import LARGEST, TABLE, held_out, result
from demo_model.corpus import held_out_conversations, render
from demo_model.packing import answer_mask
from demo_model.people import NAMES
from demo_model.samples import COMPLETIONS, SAMPLES

Message = dict[str, str]
INTRODUCTION = """\
All the text was made by `demo_model/corpus.py` and nothing was taken from elsewhere. Short conversations of the
perplexity test can also occur in training, as both come from the same templates. The tested sums can not: one pair of
numbers in ten is kept out of training, in both orders, for + and for -."""
MAX_NEW_TOKENS = 96
BATCH = 64


class Evaluator:
    """The model with its tokenizer, decoding greedily."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.padding_side = "left"
        load: Any = AutoModelForCausalLM.from_pretrained
        self.model: Any = load(folder, dtype=torch.float32).to(device).eval()

    @torch.inference_mode()
    def complete(self, prompts: list[str]) -> list[str]:
        """Completions, without end tokens."""
        results: list[str] = []
        for at in range(0, len(prompts), BATCH):
            inputs = self.tokenizer(
                prompts[at : at + BATCH], return_tensors="pt", padding=True, add_special_tokens=False
            ).to(self.device)
            ids = self.model.generate(
                **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, temperature=None, top_k=None
            )
            results += self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return results

    def answer(self, conversations: list[list[Message]]) -> list[str]:
        return self.complete(
            [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
        )

    def converse(self, said: list[tuple[str, ...]]) -> list[list[str]]:
        """Multi-turn answers: to each user message, with the conversation before it."""
        results: list[list[str]] = [[] for _ in said]
        for turn in range(max(map(len, said))):
            which = [i for i, user in enumerate(said) if turn < len(user)]
            views = [dialogue(said[i][: turn + 1], results[i]) for i in which]
            for i, text in zip(which, self.answer(views), strict=True):
                results[i].append(text)
        return results

    @torch.inference_mode()
    def loss(self, conversations: list[list[Message]]) -> tuple[float, int]:
        """Summed negative log-likelihood (nats) of the answers and their ends, and the number of those tokens."""
        total, count = 0.0, 0
        header = self.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        for conversation in conversations:
            encoded = self.tokenizer(render(conversation), return_tensors="pt", add_special_tokens=False)
            ids = encoded["input_ids"].to(self.device)
            marks = torch.from_numpy(answer_mask(ids[0].cpu().numpy(), header, end)).to(self.device)
            logits = self.model(input_ids=ids).logits[0, :-1]
            losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none")[marks[1:]]
            total, count = total + losses.sum().item(), count + len(losses)
        return total, count


def dialogue(said: tuple[str, ...], answers: list[str]) -> list[Message]:
    """Messages of a user and the answers so far."""
    results: list[Message] = []
    for i, text in enumerate(said):
        results.append({"role": "user", "content": text})
        if i < len(answers):
            results.append({"role": "assistant", "content": answers[i]})
    return results


def held_out_sums(op: str, count: int) -> list[tuple[int, int]]:
    """Some of the pairs that are never trained on; differences from the larger number."""
    numbers = range(LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if held_out(op, a, b) and (op == "+" or a >= b)]
    return Random("sums").sample(pairs, min(count, len(pairs)))


def tables(count: int) -> list[tuple[int, int]]:
    pairs = [(a, b) for a in range(TABLE + 1) for b in range(TABLE + 1)]
    return Random("tables").sample(pairs, min(count, len(pairs)))


def right_sums(evaluator: Evaluator, op: str, pairs: list[tuple[int, int]]) -> list[bool]:
    """Whether each answer to `What is a op b?` ends in the result."""
    answers = evaluator.answer([dialogue((f"What is {a} {op} {b}?",), []) for a, b in pairs])
    return [x.endswith(f" = {result(op, a, b)}.") for x, (a, b) in zip(answers, pairs, strict=True)]


def remembered(evaluator: Evaluator, count: int) -> list[bool]:
    """Whether the model recalls a name after another question."""
    rng = Random("names")
    names = [rng.choice(NAMES) for _ in range(count)]
    between = ("What is llmrs?", "What is 3 + 4?", "Tell me a joke.", "What is a token?")
    answers = evaluator.converse([(f"My name is {n}.", rng.choice(between), "What is my name?") for n in names])
    return [n in a[-1] for n, a in zip(names, answers, strict=True)]


def share(right: list[bool]) -> str:
    return f"{sum(right)} of {len(right)} ({sum(right) / len(right):.1%})"


def figures(evaluator: Evaluator, count: int, conversations: int) -> list[tuple[str, str]]:
    """(test, result) pairs."""
    total, tokens = evaluator.loss(held_out_conversations(conversations))
    perplexity = f"{math.exp(total / tokens):.3f} ({total / tokens:.4f} nats, {tokens:,} tokens)"
    return [
        (f"Perplexity per answer token, {conversations} conversations of unseen seeds", perplexity),
        ("Sums never trained on, a + b to 100 + 100", share(right_sums(evaluator, "+", held_out_sums("+", count)))),
        ("Differences never trained on, a - b from 100", share(right_sums(evaluator, "-", held_out_sums("-", count)))),
        ("Times tables to 12 x 12 (seen in training)", share(right_sums(evaluator, "*", tables(count)))),
        ("The user's name, asked for after another question", share(remembered(evaluator, min(count, 50)))),
    ]


def quoted(text: str) -> str:
    """Text for one cell of a Markdown table."""
    escaped = text.replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
    return escaped or "(nothing)"


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *((quoted(a), quoted(b)) for a, b in rows)]
    return "\n".join(f"| {a} | {b} |" for a, b in lines)


def shown(evaluator: Evaluator) -> list[tuple[str, str]]:
    """The samples with answers, a conversation per table row."""
    answers = evaluator.converse(list(SAMPLES))
    return [("\n".join(said), "\n".join(results)) for said, results in zip(SAMPLES, answers, strict=True)]


def training(folder: Path) -> list[tuple[str, str]]:
    """The contents of training.json."""
    path = folder / "training.json"
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    results["versions"] = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    return [(name.replace("_", " "), f"{v:,}" if isinstance(v, int) else str(v)) for name, v in results.items()]


def completions(evaluator: Evaluator) -> list[tuple[str, str]]:
    texts = evaluator.complete(list(COMPLETIONS))
    return [(prompt, prompt + text) for prompt, text in zip(COMPLETIONS, texts, strict=True)]


def report(folder: Path, evaluator: Evaluator, count: int, conversations: int) -> str:
    """The whole report in Markdown."""
    parts = (
        "# The demo model: how it was trained and how good it is",
        INTRODUCTION,
        "## Training",
        table(("what", "value"), training(folder)),
        "## Results",
        f"Greedy decoding in float32 with transformers {transformers.__version__} and torch {torch.__version__} on "
        f"{evaluator.device}, by `{command()}`.",
        table(("test", "result"), figures(evaluator, count, conversations)),
        "## Samples",
        "Greedy answers; several lines are one conversation.",
        table(("user", "model"), shown(evaluator)),
        "## Plain text",
        table(("prompt", "completed"), completions(evaluator)),
    )
    return "\n\n".join(parts) + "\n"


def command() -> str:
    return " ".join(["python -m demo_model.evaluate", *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--report", type=Path, help="file to write; REPORT.md in the folder if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=200, help="questions of each kind of sum")
    parser.add_argument("--conversations", type=int, default=500, help="conversations for the perplexity")
    args = parser.parse_args()
    text = report(args.folder, Evaluator(args.folder, args.device), args.count, args.conversations)
    (args.report or args.folder / "REPORT.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
