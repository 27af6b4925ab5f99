"""How far a quantized model is from the original: KL divergence of the next token, perplexity, agreement."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmrs.backends.base import Backend
from llmrs.config import EngineConfig
from llmrs.core.errors import ModelError
from llmrs.loading import make_backend, plan
from llmrs.model import Model, require_template
from llmrs.models.files.untrusted import read_text
from llmrs.models.text.message import Message
from llmrs.models.text.template import encode_chat
from llmrs.random_model import prefill_batch

CHUNK = 512  # tokens of a text that are read at once
LONGEST = 1024  # tokens of a conversation; what is beyond is not read
MAX_BYTES = 2**28
JSONL = 'each line is {"prompt": "...", "text": "..."}, as `llmrs run --output` writes it'


@dataclass(frozen=True)
class Sample:
    """A sequence, and the places of the tokens in it that are scored."""

    tokens: Sequence[int]
    places: np.ndarray  # from 1 on


@dataclass(frozen=True)
class Evaluation:
    """Means over the scored tokens; of the original and of the quantized model."""

    tokens: int
    kl_divergence: float  # of the quantized model's next token from the original's, nats
    same_top: float  # fraction of tokens at which both find the same one likeliest
    perplexity: float
    original_perplexity: float


def read_samples(path: Path, model: Model) -> list[Sample]:
    """A text in chunks; of a .jsonl file of prompts and answers each answer after its prompt. Raises ModelError."""
    text = read_text(path, MAX_BYTES)
    limit = model.config.max_position_embeddings
    if path.suffix == ".jsonl":
        samples = [_conversation(path, n, line, model) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        cut = [_cut(s, min(LONGEST, limit)) for s in samples]
    else:
        tokens, step = model.tokenizer.encode(text), min(CHUNK, limit)
        chunks = [tokens[n : n + step] for n in range(0, len(tokens), step)]
        cut = [Sample(chunk, np.arange(1, len(chunk))) for chunk in chunks]
    if not (found := [s for s in cut if len(s.places)]):
        raise ModelError(f"{path} holds no text to evaluate", f"give a longer text, or a .jsonl file: {JSONL}")
    return found


def _conversation(path: Path, number: int, line: str, model: Model) -> Sample:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}, line {number}: it is not JSON: {error}", JSONL) from error
    asked, text = (record.get(key) if isinstance(record, dict) else None for key in ("prompt", "text"))
    if not (isinstance(asked, str) and isinstance(text, str)):
        raise ModelError(f"{path}, line {number}: it has no prompt and text", JSONL)
    prompt = encode_chat(model.tokenizer, require_template(model), [Message("user", asked)])
    answer = model.tokenizer.encode_ordinary(text, first=False)
    tokens = [*prompt.token_ids, *answer, model.eos_ids[0]]
    return Sample(tokens, np.arange(len(prompt.token_ids), len(tokens)))


def _cut(s: Sample, length: int) -> Sample:
    return Sample(s.tokens[:length], s.places[s.places < length])


def evaluate(
    original: Model, quantized: Model, samples: Sequence[Sample], config: EngineConfig,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:  # fmt: skip
    """Runs both models, which are in memory together. Raises LlmrsError."""
    total = np.zeros(4)
    longest = max(len(s.tokens) for s in samples)
    with closing(loaded(original, config, longest)) as a, closing(loaded(quantized, config, longest)) as b:
        for n, s in enumerate(samples):
            rows = s.places - 1
            total += _compare(logits(a, s.tokens, rows), logits(b, s.tokens, rows), np.array(s.tokens)[s.places])
            progress(n + 1, len(samples))
    tokens = sum(len(s.places) for s in samples)
    kl, same, loss, original_loss = (float(v) for v in total / tokens)
    return Evaluation(tokens, kl, same, _exp(loss), _exp(original_loss))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def loaded(model: Model, config: EngineConfig, longest: int) -> Backend:
    """A backend with the model's weights, for one sequence of at most `longest` tokens. Raises LlmrsError."""
    config = dataclasses.replace(
        config,
        max_model_len=max(longest, 2),
        max_num_seqs=1,
        max_num_batched_tokens=longest,
        cuda_graphs=False,
        quant=None,
        save_quantized=None,
    )
    backend = make_backend(config)
    weights = model.open_weights()
    plan(backend, config, model, weights.stored(), backend.free_memory()).check()
    backend.load(model.graph, weights, lambda done: None)
    size = backend.block_size
    backend.allocate(-(-longest // size) + 1, size, 1, longest, longest)
    return backend


def logits(backend: Backend, tokens: Sequence[int], rows: np.ndarray) -> np.ndarray:
    """float32 (rows, V) after these tokens of a sequence."""
    batch = dataclasses.replace(prefill_batch([tokens], backend.block_size), logits_indices=rows.astype(np.int32))
    return backend.to_host(backend.forward(batch))


def _compare(a: np.ndarray, b: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Sums over rows: KL divergence of b from a, rows with the same likeliest token, losses of b and a."""
    p, q = _log_softmax(a), _log_softmax(b)
    at = np.arange(len(tokens)), tokens
    return np.array([(np.exp(p) * (p - q)).sum(), (a.argmax(1) == b.argmax(1)).sum(), -q[at].sum(), -p[at].sum()])


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))
