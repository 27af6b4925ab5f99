"""Small models with random weights, and cores, requests and batches to run them, for tests and benchmarks."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrs.backends.base import Backend
from llmrs.core.batch import Batch, NewRequest
from llmrs.core.blocks import BlockPool
from llmrs.core.engine import EngineCore
from llmrs.core.ir import Graph
from llmrs.core.options import BUILT_IN, SamplingParams
from llmrs.core.request import Request
from llmrs.core.sampling import SamplingArrays, noise_keys
from llmrs.models.arch.config import parse
from llmrs.models.arch.families import family, graph_of
from llmrs.quant.form import SUPER_BLOCK, TABLES, Form
from llmrs.quant.tensor import AnyTensor, Format, QuantTensor, Tensor

VOCABULARY = 211  # a prime
BLOCK = 4
CONTEXT = 256
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
# name -> architecture, changes to SHAPE; windows are shorter than the prompts
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 9, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeForCausalLM",
                  {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 24, "sliding_window": 6, "num_hidden_layers": 7}),
}  # fmt: skip


@dataclass(frozen=True)
class RandomModel:
    """A small model with reproducible random weights."""

    graph: Graph
    weights: Mapping[str, AnyTensor]

    @staticmethod
    def of(name: str, **changes: Any) -> "RandomModel":
        """One of MODELS."""
        architecture, fields = MODELS[name]
        data = {**SHAPE, **fields, **changes, "architectures": [architecture]}
        graph = graph_of(parse(Path(name), data, family(architecture).defaults))
        rng = np.random.default_rng(0)
        weights: dict[str, Tensor] = {}
        for weight in graph.weights():
            for s in weight.segments:
                values = rng.normal(float("norm" in s.tensor), 0.25, (s.rows, *weight.columns)).astype(np.float32)
                weights.setdefault(s.tensor, Tensor("f32", values.shape, values))
        return RandomModel(graph, weights)

    def quantized(self, *forms: tuple[Form, Sequence[str]]) -> "RandomModel":
        """Its matrices in these forms (and their optional planes) in turn; with values of their own."""
        rng, weights, turn = np.random.default_rng(1), dict[str, AnyTensor](), itertools.cycle(forms)
        for name, t in self.weights.items():
            dense = len(t.shape) < 2 or "router" in name
            weights[name] = t if dense else random_quantized(rng, *next(turn), (t.shape[0], t.shape[1]))
        return RandomModel(self.graph, weights)

    def on(self, backend: Backend) -> Backend:
        """Loads this model into the backend."""
        backend.load(self.graph, self.weights, lambda done: None)
        return backend


def random_quantized(rng: np.random.Generator, form: Form, more: Sequence[str], shape: tuple[int, int]) -> QuantTensor:
    """Random planes; `more` names the optional ones. The weights' root mean square is about 0.25."""
    rows, groups, supers = shape[0], shape[1] // form.group, shape[1] // SUPER_BLOCK
    size = 0.25 / (np.sqrt((TABLES[form.code] ** 2).mean()) if form.code in TABLES else 2 ** (form.bits - 2))
    exponents = {"e4m3": (0x18, 0x20), "e8m0": (122, 125), "half_e8m0": (122, 125)}  # about 1 / 16

    def floats(dtype: str, value: float, *shape: int) -> np.ndarray:
        x = (value * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
        if dtype == "bf16":
            return (x.view(np.uint32) >> 16).astype(np.uint16)
        return x.astype(np.float16) if dtype == "f16" else x

    def integers(low: int, high: int, *shape: int) -> np.ndarray:
        return rng.integers(low, high, shape, np.uint8)

    steps = 8 if form.scale == "u4" else 32  # of a scale relative to its super-scale, at most twice that
    made: dict[str, Callable[[], np.ndarray]] = {
        "biases": lambda: floats(form.scale, -0.4, rows, groups),
        "zeros": lambda: integers(7, 10, rows, groups),
        "mins": lambda: integers(0, 64, rows, groups),
        "super_scales": lambda: floats("f16", size / steps, rows, supers),
        "super_mins": lambda: floats("f16", 0.4 / steps, rows, supers),
        "row_scales": lambda: floats("f32", 1, rows, 1),
    }
    codes = integers(0, 256, rows, shape[1] * form.bits // 8)
    if form.code == "e4m3":  # 2 to 15 in size, no NaN
        codes, size = codes & 0x87 | 0x40 | integers(0, 3, *codes.shape) << 3, 0.04
    if form.scale in ("f32", "f16", "bf16"):
        scales = floats(form.scale, size, rows, groups)
    else:
        scales = integers(*exponents.get(form.scale, (0, 256 if form.scale == "u4" else 64)), rows, groups)
        scales = (scales - 32).view(np.int8) if form.scale == "i8" else scales
    planes = {"codes": codes, "scales": scales, **{name: made[name]() for name in more}}
    return QuantTensor(Format(str(form), form, lambda xp, arrays: dict(arrays)), shape, planes)


def core_on(backend: Backend, blocks: int = 200, block_size: int = BLOCK, **config: Any) -> EngineCore:
    """An engine core with its own block pool."""
    config = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **config}
    pool = BlockPool(blocks, block_size, config.pop("prefix_cache", True))
    length = min(CONTEXT, blocks * block_size)
    backend.allocate(blocks, block_size, config["max_num_seqs"], length)
    return EngineCore(backend, pool, vocab_size=VOCABULARY, max_model_len=length, **config)


def request(prompt: Sequence[int], seed: int = 0, stops: Sequence[int] = (), **params: Any) -> Request:
    """A request, greedy by default."""
    return Request(prompt, SamplingParams(**{"temperature": 0.0, **params}).over(BUILT_IN), seed, stops)


def run(core: EngineCore, requests: Sequence[Request]) -> list[list[int]]:
    """Runs all requests to their end; their output tokens."""
    for r in requests:
        core.submit(r)
    while not core.idle:
        core.step()
    assert all(r.error is None for r in requests), [r.error for r in requests]
    return [r.output for r in requests]


def prompts(*lengths: int) -> list[list[int]]:
    """Reproducible random prompts of these lengths."""
    return [np.random.default_rng(n).integers(0, VOCABULARY, n).tolist() for n in lengths]


def make_batch(query_lens: np.ndarray, seq_lens: np.ndarray, block_tables: np.ndarray, **fields: Any) -> Batch:
    """A step of the last `query_lens` tokens of each sequence, in slots 0, 1, ...; greedy, and token 0 by default.

    Lengths are int32 (S,), block_tables int32 (S, B).
    """
    count, starts = len(seq_lens), np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    pairs = zip(query_lens, seq_lens, strict=True)
    defaults = {
        "input_ids": np.zeros(starts[-1], np.int32),
        "positions": np.concatenate([np.arange(n - q, n, dtype=np.int32) for q, n in pairs]),
        "req_slots": np.arange(count, dtype=np.int32),
        "do_sample": np.ones(count, bool),
        "sampling": SamplingArrays.zeros(count),
        "logits_indices": starts[1:] - 1,
        "prompt_logprob_ids": np.zeros(0, np.int32),
    }
    return Batch(query_start_loc=starts, seq_lens=seq_lens, block_tables=block_tables, **{**defaults, **fields})


def prefill_batch(sequences: Sequence[Sequence[int]], block_size: int = BLOCK) -> Batch:
    """One step that prefills whole sequences, each in its own blocks."""
    lens = np.array([len(s) for s in sequences], np.int32)
    width = int(-(-lens.max() // block_size))
    blocks = np.arange(len(lens) * width, dtype=np.int32).reshape(len(lens), width)
    return make_batch(lens, lens, blocks, input_ids=np.concatenate([np.array(s, np.int32) for s in sequences]))


def sampling_batch(sampling: SamplingArrays, new_requests: Sequence[NewRequest] = (), **more: Any) -> Batch:
    """A decode step whose sequences are the tokens of `new_requests`."""
    seq_lens = np.ones(len(sampling.rng_key), np.int32)
    for r in new_requests:
        seq_lens[r.slot] = len(r.tokens)
    query_lens, blocks = np.ones_like(seq_lens), np.zeros((len(seq_lens), 1), np.int32)
    return make_batch(query_lens, seq_lens, blocks, sampling=sampling, new_requests=new_requests, **more)


def random_sampling(rng: np.random.Generator, count: int) -> SamplingArrays:
    """Random mixes of all parameters, neutral values included."""
    arrays = SamplingArrays.zeros(count)
    values: dict[str, list[float]] = {
        "temperature": [0.0, 0.7, 1.0, 3.0], "top_k": [0, 1, 5, 10**6],
        "top_p": [0.0, 0.3, 0.95, 1.0], "min_p": [0.0, 0.02, 0.3],
        "repetition_penalty": [1.0, 1.3, 0.7], "presence_penalty": [0.0, 0.5, -1.0],
        "frequency_penalty": [0.0, 0.25, -0.5],
    }  # fmt: skip
    for name, choice in values.items():
        getattr(arrays, name)[:] = rng.choice(choice, count)
    arrays.rng_key[:] = noise_keys(np.zeros(count, np.uint32), np.arange(count))
    return arrays


def random_step(rng: np.random.Generator, count: int, vocabulary: int) -> tuple[np.ndarray, Batch, np.ndarray]:
    """Logits float32 (S, V) with ties, a step with every kind of parameter, and a mask uint32 (S, ceil(V / 32))."""
    sampling = random_sampling(rng, count)
    new_requests = []
    for slot in range(count):
        tokens = rng.integers(0, vocabulary, rng.integers(1, 40)).astype(np.int32)
        ids = rng.choice(vocabulary, min(3, vocabulary), replace=False).astype(np.int32)
        bias = rng.choice([-4.0, 0.5, 8.0], len(ids)).astype(np.float32)
        new_requests.append(NewRequest(slot, tokens, ids[:slot], bias[:slot]))
        sampling.prompt_len[slot] = rng.integers(1, len(tokens) + 1)
    banned = rng.integers(1, vocabulary + 1, (count, 2)).astype(np.int32)
    banned[banned == vocabulary] = -1
    flags = rng.random((count, -(-vocabulary // 32) * 32)) < 0.5
    flags[:, 0] = True  # neither banned nor masked out
    mask = np.packbits(flags, axis=-1, bitorder="little").view(np.uint32)
    logits = np.round(rng.normal(size=(count, vocabulary)) * 4).astype(np.float32) / 2
    return logits, sampling_batch(sampling, new_requests, banned_ids=banned, logprobs=int(rng.integers(-1, 4))), mask
