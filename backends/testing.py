"""What every backend must pass: a suite for pytest, here or in a package of its own.

    from llmrs.backends.testing import BackendSuite

    class TestMyBackend(BackendSuite):
        backend = "mine"  # as registered under the entry points `llmrs.backends`
        device = "auto"

Everything is compared with the reference backend, in float32, on small models with random weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrs.backends.base import Backend, find, pick_device
from llmrs.core.batch import Batch, Begun
from llmrs.core.blocks import BlockPool
from llmrs.core.config import BUILT_IN, EngineConfig, SamplingParams
from llmrs.core.engine import EngineCore
from llmrs.core.ir import Graph
from llmrs.core.request import Likely, Request
from llmrs.core.sampling import SamplingArrays, noise_keys
from llmrs.models.config import parse
from llmrs.models.families import family, graph_of
from llmrs.quant.tensor import Tensor

VOCABULARY = 211  # a prime: a multiple of nothing
BLOCK = 4
CONTEXT = 256
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
# name -> architecture, and what differs from SHAPE; windows are shorter than the prompts
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 9, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 24, "sliding_window": 6, "num_hidden_layers": 7}),
}


@dataclass(frozen=True)
class RandomModel:
    """A small model with random weights, the same each time."""

    graph: Graph
    weights: Mapping[str, Tensor]

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

    def on(self, backend: Backend) -> Backend:
        """The backend with this model loaded."""
        backend.load(self.graph, self.weights, lambda done: None)
        return backend


def core_on(backend: Backend, blocks: int = 200, block_size: int = BLOCK, **config: Any) -> EngineCore:
    """An engine core with a pool of its own."""
    config = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **config}
    pool = BlockPool(blocks, block_size, config.pop("prefix_cache", True))
    length = min(CONTEXT, blocks * block_size)
    backend.allocate(blocks, block_size, config["max_num_seqs"], length)
    return EngineCore(backend, EngineConfig(**config), VOCABULARY, length, pool)


def request(prompt: Sequence[int], seed: int = 0, stops: Sequence[int] = (), **params: Any) -> Request:
    """A request; greedy unless told otherwise."""
    return Request(prompt, SamplingParams(**{"temperature": 0.0, **params}).over(BUILT_IN), seed, stops)


def run(core: EngineCore, requests: Sequence[Request]) -> list[list[int]]:
    """Submits all and steps until nothing is left; the answers."""
    for r in requests:
        core.submit(r)
    while not core.idle:
        core.step()
    assert all(r.error is None for r in requests), [r.error for r in requests]
    return [r.output for r in requests]


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts, the same each time."""
    return [np.random.default_rng(n).integers(0, VOCABULARY, n).tolist() for n in lengths]


def prefill_batch(sequences: Sequence[Sequence[int]], block_size: int = BLOCK) -> Batch:
    """One step that computes whole sequences from nothing, each in blocks of its own."""
    counts = np.array([len(s) for s in sequences], np.int32)
    width = int(-(-counts.max() // block_size))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return Batch(
        tokens=np.concatenate([np.array(s, np.int32) for s in sequences]),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        starts=starts,
        lengths=counts,
        blocks=np.arange(len(counts) * width, dtype=np.int32).reshape(len(counts), width),
        slots=np.arange(len(counts), dtype=np.int32),
        sampled=np.ones(len(counts), bool),
        sampling=SamplingArrays.zeros(len(counts)),
        rows=starts[1:] - 1,
        targets=np.zeros(0, np.int32),
    )


def sampling_batch(sampling: SamplingArrays, begun: Sequence[Begun] = (), **more: Any) -> Batch:
    """A step of one token a sequence, in slots 0, 1, ..., whose tokens so far are those of `begun`."""
    count = len(sampling.key)
    lengths = np.ones(count, np.int32)
    for b in begun:
        lengths[b.slot] = len(b.tokens)
    return Batch(
        tokens=np.zeros(count, np.int32),
        positions=lengths - 1,
        starts=np.arange(count + 1, dtype=np.int32),
        lengths=lengths,
        blocks=np.zeros((count, 1), np.int32),
        slots=np.arange(count, dtype=np.int32),
        sampled=np.ones(count, bool),
        sampling=sampling,
        rows=np.arange(count, dtype=np.int32),
        targets=np.zeros(0, np.int32),
        begun=begun,
        **more,
    )


def random_sampling(rng: np.random.Generator, count: int) -> SamplingArrays:
    """Every mix of parameters, neutral ones too."""
    arrays = SamplingArrays.zeros(count)
    values: dict[str, list[float]] = {
        "temperature": [0.0, 0.7, 1.0, 3.0],
        "top_k": [0, 1, 5, 10**6],
        "top_p": [0.0, 0.3, 0.95, 1.0],
        "min_p": [0.0, 0.02, 0.3],
        "repetition_penalty": [1.0, 1.3, 0.7],
        "presence_penalty": [0.0, 0.5, -1.0],
        "frequency_penalty": [0.0, 0.25, -0.5],
    }
    for name, choice in values.items():
        getattr(arrays, name)[:] = rng.choice(choice, count)
    arrays.key[:] = noise_keys(np.zeros(count, np.uint32), np.arange(count))
    return arrays


def random_step(rng: np.random.Generator, count: int, vocabulary: int) -> tuple[np.ndarray, Batch, np.ndarray]:
    """Logits float32 (S, V) with ties, a step with every kind of parameter, and a mask that leaves something over."""
    sampling = random_sampling(rng, count)
    begun = []
    for slot in range(count):
        tokens = rng.integers(0, vocabulary, rng.integers(1, 40)).astype(np.int32)
        ids = rng.choice(vocabulary, min(3, vocabulary), replace=False).astype(np.int32)
        bias = rng.choice([-4.0, 0.5, 8.0], len(ids)).astype(np.float32)
        begun.append(Begun(slot, tokens, ids[:slot], bias[:slot]))
        sampling.prompt[slot] = rng.integers(1, len(tokens) + 1)
    banned = rng.integers(1, vocabulary + 1, (count, 2)).astype(np.int32)
    banned[banned == vocabulary] = -1
    flags = rng.random((count, -(-vocabulary // 32) * 32)) < 0.5
    flags[:, 0] = True  # neither banned nor masked out
    mask = np.packbits(flags, axis=-1, bitorder="little").view(np.uint32)
    logits = np.round(rng.normal(size=(count, vocabulary)) * 4).astype(np.float32) / 2
    return logits, sampling_batch(sampling, begun, banned=banned, logprobs=int(rng.integers(-1, 4))), mask


class BackendSuite:
    """Subclass it as the module says."""

    backend = "reference"
    device = "auto"
    tolerance = 1e-4  # of logits in float32, which are about 10

    def make(self, dtype: str = "f32", kv_dtype: str | None = None) -> Backend:
        kind = find(self.backend)
        return kind(pick_device(kind, self.device), dtype, kv_dtype or dtype)

    @pytest.fixture(params=MODELS)
    def model(self, request: pytest.FixtureRequest) -> RandomModel:
        return RandomModel.of(request.param)

    def answers(self, model: RandomModel, requests: Callable[[], Sequence[Request]], **core: Any) -> list[list[int]]:
        backend = model.on(self.make())
        found = run(core_on(backend, **core), requests())
        backend.close()
        return found

    def test_logits(self, model: RandomModel) -> None:
        """On prompts of one token, of a block, of one more, of several, and longer than a window."""
        batch = prefill_batch(prompts(1, BLOCK, BLOCK + 1, 23, 64))
        found = []
        for backend in (self.make(), find("reference")("cpu", "f32", "f32")):
            model.on(backend).allocate(100, BLOCK, 8, CONTEXT)
            found.append(backend.to_host(backend.forward(batch)))
        assert np.abs(found[1]).max() > 1
        assert np.abs(found[0] - found[1]).max() < self.tolerance

    def test_tokens_do_not_depend_on_how_steps_are_cut(self, model: RandomModel) -> None:
        """Alone, in a batch, in parts, preempted, from the prefix cache: the reference's tokens."""

        def ask() -> list[Request]:
            shared = prompts(30)[0]
            mixed = [request(p, max_tokens=24) for p in prompts(1, 9, 40)]
            return [*mixed, *(request([*shared, n], n, temperature=0.8, top_p=0.9, max_tokens=24) for n in range(3))]

        reference = model.on(find("reference")("cpu", "f32", "f32"))
        expected = [run(core_on(reference), [r])[0] for r in ask()]
        backend = model.on(self.make())
        assert [run(core_on(backend), [r])[0] for r in ask()] == expected
        for cut in (
            {},
            {"max_num_batched_tokens": 8},
            {"blocks": 20, "max_num_seqs": 4},
            {"prefix_cache": False, "blocks": 30},
        ):
            core = core_on(backend, **cut)
            assert run(core, ask()) == expected, cut
            assert run(core, ask()) == expected, cut  # the second time from the cache, where there is one
        backend.close()
        backend.close()

    def test_logits_with_a_kv_cache_in_fp8(self) -> None:
        """Near the reference's with the same cache, and farther from those with one that is exact."""
        if "fp8" not in find(self.backend).kv_dtypes:
            pytest.skip("has no fp8")
        batch, reference = prefill_batch(prompts(1, 9, 21)), find("reference")
        found = []
        for backend in (self.make("f32", "fp8"), reference("cpu", "f32", "fp8"), reference("cpu", "f32", "f32")):
            RandomModel.of("qwen3", num_hidden_layers=2).on(backend).allocate(100, BLOCK, 8, CONTEXT)
            found.append(backend.to_host(backend.forward(batch)))
        ours, expected, exact = found
        assert np.linalg.norm(ours - expected) < 0.1 * np.linalg.norm(expected - exact)

    def test_a_kv_cache_in_fp8(self) -> None:
        """The reference's tokens, however steps are cut: what is kept of a token depends on it alone."""
        if "fp8" not in find(self.backend).kv_dtypes:
            pytest.skip("has no fp8")
        model = RandomModel.of("qwen3", num_hidden_layers=2)

        def ask() -> list[Request]:
            return [request(p, max_tokens=8) for p in prompts(1, 9, 21)]

        expected = run(core_on(model.on(find("reference")("cpu", "f32", "fp8"))), ask())
        backend = model.on(self.make("f32", "fp8"))
        for cut in ({}, {"max_num_batched_tokens": 8}, {"blocks": 10, "max_num_seqs": 3}):
            core = core_on(backend, **cut)
            assert run(core, ask()) == expected, cut
            assert run(core, ask()) == expected, cut

    def test_sampling_options_in_a_running_engine(self) -> None:
        """Penalties, biases, masks, minimum lengths and log probabilities, with everything else in the batch."""
        model = RandomModel.of("qwen3")
        common = {"temperature": 0.9, "max_tokens": 20}
        each: list[dict[str, Any]] = [
            {"repetition_penalty": 1.5, "logprobs": 3},
            {"presence_penalty": 1.0, "frequency_penalty": 0.5},
            {"logit_bias": {5: 20.0, 7: -100.0}, "prompt_logprobs": 2},
            {"min_tokens": 15, "logit_bias": {9: 30.0}},
            {},
        ]

        def ask() -> list[Request]:
            return [
                request(p, n, [9], **{**common, **more})
                for n, (p, more) in enumerate(zip(prompts(9, 20, 13, 5, 30), each, strict=True))
            ]

        lists = []
        for backend in (self.make(), find("reference")("cpu", "f32", "f32")):
            core = core_on(model.on(backend), max_num_batched_tokens=16)
            asked = ask()
            run(core, asked)
            lists.append(asked)
            assert len(asked[3].output) == 16  # banned until then, and bound to come after
        for ours, expected in zip(*lists, strict=True):
            assert ours.output == expected.output
            assert_alike(ours.logprobs, expected.logprobs)
            assert_alike(ours.prompt_logprobs[1:], expected.prompt_logprobs[1:])
        assert len(lists[0][0].logprobs) == len(lists[0][0].output)

    @pytest.mark.parametrize("vocabulary", [2, 33, 211])
    def test_sampling_alone(self, vocabulary: int) -> None:
        """Random steps on one backend, so that slots are taken over from others."""
        model = RandomModel.of("qwen3", num_hidden_layers=1)
        ours, reference = model.on(self.make()), model.on(find("reference")("cpu", "f32", "f32"))
        for backend in (ours, reference):
            backend.allocate(1, BLOCK, 8, CONTEXT)
        for seed in range(40):
            rng = np.random.default_rng(seed)
            logits, batch, mask = random_step(rng, int(rng.integers(1, 6)), vocabulary)
            chosen = mask if seed % 2 else None
            tickets = [b.sample(b.to_device(logits), batch, chosen) for b in (ours, reference)]
            np.testing.assert_array_equal(tickets[0].tokens(), tickets[1].tokens())
            found, expected = (t.logprobs() for t in tickets)
            assert (found is None) == (expected is None) == (batch.logprobs < 0)
            if found is not None and expected is not None:
                np.testing.assert_array_equal(found.top_ids, expected.top_ids)
                np.testing.assert_allclose(found.top, expected.top, atol=1e-5)
                np.testing.assert_allclose(found.chosen, expected.chosen, atol=1e-5)

    def test_the_device_knows_the_last_token_of_a_slot(self) -> None:
        """A step that names tokens by their slots is the step that names the tokens themselves."""
        model = RandomModel.of("llama")
        results = []
        for hidden in (False, True):
            backend = model.on(self.make())
            backend.allocate(100, BLOCK, 8, CONTEXT)
            first = prefill_batch(prompts(9, 3))
            tokens = backend.launch(first).tokens()
            step = sampling_batch(SamplingArrays.zeros(2))
            fed = -1 - step.slots if hidden else tokens
            lengths = first.lengths + 1
            batch = Batch(
                **{**vars(step), "tokens": fed, "positions": lengths - 1, "lengths": lengths, "blocks": first.blocks}
            )
            results.append(backend.launch(batch).tokens().tolist())
        assert results[0] == results[1]

    @pytest.mark.parametrize("dtype", ["bf16", "f16"])
    def test_half_precision_follows_float32(self, dtype: str) -> None:
        """As far as the mantissa carries; a wrong type somewhere would not."""
        model, found = RandomModel.of("qwen3"), []
        for kind in ("f32", dtype):
            backend = model.on(self.make(kind))
            backend.allocate(64, BLOCK, 4, CONTEXT)
            found.append(backend.to_host(backend.forward(prefill_batch(prompts(30, 7)))))
        error = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[0])
        assert error < 0.08


def assert_alike(ours: Sequence[Likely | None], expected: Sequence[Likely | None]) -> None:
    """Log probabilities that agree up to rounding."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a is not None
        assert b is not None
        assert a[0] == b[0]
        assert a[1] == pytest.approx(b[1], abs=1e-4)
        assert a[3] == pytest.approx(b[3], abs=1e-4)
