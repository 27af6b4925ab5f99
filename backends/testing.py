"""The conformance suite of backends, for pytest, in this repository or in another package.

    from llmrs.backends.testing import BackendSuite

    class TestMyBackend(BackendSuite):
        backend = "mine"  # as registered under the entry points `llmrs.backends`
        device = "auto"

It compares with the reference backend in float32, on small models with random weights.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmrs.backends.base import Backend, load_backend, pick_device
from llmrs.core.request import Request, TokenLogprobs
from llmrs.core.sampling import SamplingArrays
from llmrs.quant.form import Form
from llmrs.quant.tensor import AnyTensor
from llmrs.random_model import (
    BLOCK,
    CONTEXT,
    MODELS,
    SHAPE,
    VOCABULARY,
    RandomModel,
    core_on,
    prefill_batch,
    prompts,
    random_sampling,
    random_step,
    request,
    run,
    sampling_batch,
)

__all__ = [
    "BLOCK",
    "CONTEXT",
    "FORMS",
    "MODELS",
    "SHAPE",
    "VOCABULARY",
    "BackendSuite",
    "Forms",
    "RandomModel",
    "core_on",
    "prefill_batch",
    "prompts",
    "random_sampling",
    "random_step",
    "request",
    "run",
    "sampling_batch",
]  # fmt: skip

Forms = Sequence[tuple[Form, tuple[str, ...]]]  # with their optional planes
SUPERS = ("super_scales", "mins", "super_mins")
FORMS: list[Forms] = [
    [(Form("affine", "u4", 64, "bf16"), ("biases",))],  # MLX
    [(Form("k_quant", "u4", 32, "u8"), SUPERS), (Form("k_quant", "u6", 16, "i8", 32), ("super_scales",))],  # Q4_K, Q6_K
    [(Form("k_quant", "u5", 32, "u8"), SUPERS), (Form("k_quant", "u3", 16, "i8", 4), ("super_scales",))],
    [
        (Form("k_quant", "u2", 16, "u4"), ("super_scales", "super_mins")),
        (Form("fp4", "iq4", 32, "i8"), ("super_scales",)),
    ],
    [(Form("affine", "u8", 32, "f16", 128), ()), (Form("affine", "u5", 32, "f16"), ("biases",))],  # Q8_0, Q5_1
    [(Form("affine", "u4", 128, "f16"), ("zeros",)), (Form("affine", "u3", 32, "f32"), ("biases",))],  # AWQ
    [(Form("affine", "u6", 64, "f16"), ("biases",)), (Form("affine", "u2", 128, "bf16"), ("biases",))],
    [(Form("fp4", "double_e2m1", 32, "half_e8m0"), ()), (Form("fp4", "e2m1", 32, "e8m0"), ())],  # MXFP4
    [(Form("fp4", "e2m1", 16, "e4m3"), ("row_scales",)), (Form("fp4", "e2m1", 16, "e4m3"), ())],  # NVFP4
    [(Form("fp8", "e4m3", 128, "f32"), ()), (Form("fp8", "e4m3", 32, "e8m0"), ()), (Form("fp4", "iq4", 32, "f16"), ())],
]


class BackendSuite:
    """Subclass it and set `backend`."""

    backend = "reference"
    device = "auto"
    tolerance = 1e-4  # of float32 logits, which are about 10

    def make(self, dtype: str = "f32", kv_dtype: str | None = None) -> Backend:
        kind = load_backend(self.backend)
        return kind(pick_device(kind, self.device), dtype, kv_dtype or dtype)

    @pytest.fixture(params=MODELS)
    def model(self, request: pytest.FixtureRequest) -> RandomModel:
        return RandomModel.of(request.param)

    def test_logits(self, model: RandomModel) -> None:
        """Prompts of one token, one block, one more, several blocks, and longer than a window."""
        batch = prefill_batch(prompts(1, BLOCK, BLOCK + 1, 23, 64))
        logits = []
        for backend in (self.make(), load_backend("reference")("cpu", "f32", "f32")):
            model.on(backend).allocate(100, BLOCK, 8, CONTEXT)
            logits.append(backend.to_host(backend.forward(batch)))
        assert np.abs(logits[1]).max() > 1
        assert np.abs(logits[0] - logits[1]).max() < self.tolerance

    def test_tokens_do_not_depend_on_batching(self, model: RandomModel) -> None:
        """Alone, batched, with chunked prefill, preempted, from the prefix cache: the reference's tokens."""

        def ask() -> list[Request]:
            shared = prompts(30)[0]
            mixed = [request(p, max_tokens=24) for p in prompts(1, 9, 40)]
            return [*mixed, *(request([*shared, n], n, temperature=0.8, top_p=0.9, max_tokens=24) for n in range(3))]

        reference = model.on(load_backend("reference")("cpu", "f32", "f32"))
        expected = [run(core_on(reference), [r])[0] for r in ask()]
        backend = model.on(self.make())
        assert [run(core_on(backend), [r])[0] for r in ask()] == expected
        for options in (
            {},
            {"max_num_batched_tokens": 8},
            {"blocks": 20, "max_num_seqs": 4},
            {"prefix_cache": False, "blocks": 30},
        ):
            core = core_on(backend, **options)
            assert run(core, ask()) == expected, options
            assert run(core, ask()) == expected, options  # from the prefix cache, if enabled
        backend.close()
        backend.close()

    def test_logits_with_a_kv_cache_in_fp8(self) -> None:
        """Closer to the reference's fp8 logits than those are to its float32 logits."""
        if "fp8" not in load_backend(self.backend).kv_dtypes:
            pytest.skip("no fp8")
        batch, reference = prefill_batch(prompts(1, 9, 21)), load_backend("reference")
        logits = []
        for backend in (self.make("f32", "fp8"), reference("cpu", "f32", "fp8"), reference("cpu", "f32", "f32")):
            RandomModel.of("qwen3", num_hidden_layers=2).on(backend).allocate(100, BLOCK, 8, CONTEXT)
            logits.append(backend.to_host(backend.forward(batch)))
        ours, expected, exact = logits
        assert np.linalg.norm(ours - expected) < 0.1 * np.linalg.norm(expected - exact)

    def test_a_kv_cache_in_fp8(self) -> None:
        """The reference's tokens, however they are batched: a token's fp8 data depends on that token alone."""
        if "fp8" not in load_backend(self.backend).kv_dtypes:
            pytest.skip("no fp8")
        model = RandomModel.of("qwen3", num_hidden_layers=2)

        def ask() -> list[Request]:
            return [request(p, max_tokens=8) for p in prompts(1, 9, 21)]

        expected = run(core_on(model.on(load_backend("reference")("cpu", "f32", "fp8"))), ask())
        backend = model.on(self.make("f32", "fp8"))
        for options in ({}, {"max_num_batched_tokens": 8}, {"blocks": 10, "max_num_seqs": 3}):
            core = core_on(backend, **options)
            assert run(core, ask()) == expected, options
            assert run(core, ask()) == expected, options

    def test_sampling_options_in_a_running_engine(self) -> None:
        """Penalties, biases, minimum lengths and log probabilities in one batch."""
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
        for backend in (self.make(), load_backend("reference")("cpu", "f32", "f32")):
            core = core_on(model.on(backend), max_num_batched_tokens=16)
            asked = ask()
            run(core, asked)
            lists.append(asked)
            assert len(asked[3].output) == 16  # banned until then, certain afterwards
        for ours, expected in zip(*lists, strict=True):
            assert ours.output == expected.output
            assert_logprobs_close(ours.logprobs, expected.logprobs)
            assert_logprobs_close(ours.prompt_logprobs[1:], expected.prompt_logprobs[1:])
        assert len(lists[0][0].logprobs) == len(lists[0][0].output)

    @pytest.mark.parametrize("vocabulary", [2, 33, 211])
    def test_sampling(self, vocabulary: int) -> None:
        """Random steps on one backend, so that request slots are reused."""
        model = RandomModel.of("qwen3", num_hidden_layers=1)
        ours, reference = model.on(self.make()), model.on(load_backend("reference")("cpu", "f32", "f32"))
        for backend in (ours, reference):
            backend.allocate(1, BLOCK, 8, CONTEXT)
        for seed in range(40):
            rng = np.random.default_rng(seed)
            logits, batch, mask = random_step(rng, int(rng.integers(1, 6)), vocabulary)
            chosen = mask if seed % 2 else None
            outputs = [b.sample(b.to_device(logits), batch, chosen) for b in (ours, reference)]
            np.testing.assert_array_equal(outputs[0].tokens(), outputs[1].tokens())
            actual, expected = (t.logprobs() for t in outputs)
            assert (actual is None) == (expected is None) == (batch.logprobs < 0)
            if actual is not None and expected is not None:
                np.testing.assert_array_equal(actual.top_ids, expected.top_ids)
                np.testing.assert_allclose(actual.top, expected.top, atol=1e-5)
                np.testing.assert_allclose(actual.chosen, expected.chosen, atol=1e-5)

    @pytest.mark.parametrize("forms", FORMS, ids=lambda forms: "+".join(dict.fromkeys(str(f) for f, _ in forms)))
    def test_quantized_weights(self, forms: Forms) -> None:
        """Logits and tokens of matrices in these forms, merged ones, tables and heads included."""
        sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
        model = RandomModel.of("qwen3", **sizes, tie_word_embeddings=len(forms) == 1).quantized(*forms)
        batch, logits, tokens = prefill_batch(prompts(1, 9, 21)), [], []
        for backend in (self.make(), load_backend("reference")("cpu", "f32", "f32")):
            core = core_on(model.on(backend))
            logits.append(backend.to_host(backend.forward(batch)))
            tokens.append(run(core, [request(p, max_tokens=6) for p in prompts(3, 11)]))
        assert np.abs(logits[1]).max() > 1
        assert np.abs(logits[0] - logits[1]).max() < self.tolerance * np.abs(logits[1]).max()
        assert tokens[0] == tokens[1]

    def test_quantized_experts(self) -> None:
        shapes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
        for forms in ([FORMS[0][0]], [FORMS[1][0]], [FORMS[0][0], FORMS[1][0]]):
            model, logits = RandomModel.of("qwen3-moe", **shapes).quantized(*forms), []
            for backend in (self.make(), load_backend("reference")("cpu", "f32", "f32")):
                model.on(backend).allocate(100, BLOCK, 8, CONTEXT)
                logits.append(backend.to_host(backend.forward(prefill_batch(prompts(1, 9, 21)))))
            assert np.abs(logits[0] - logits[1]).max() < self.tolerance * np.abs(logits[1]).max()

    def test_each_weight_is_read_once(self, model: RandomModel) -> None:
        """A second read would quantize it again."""
        reads = Reads(model.weights)
        RandomModel(model.graph, reads).on(self.make())
        assert reads.counts == dict.fromkeys(model.weights, 1)

    def test_placeholder_tokens(self) -> None:
        """A step with placeholders (-1 - slot) equals the step with the token ids."""
        model = RandomModel.of("llama")
        results = []
        for placeholder in (False, True):
            backend = model.on(self.make())
            backend.allocate(100, BLOCK, 8, CONTEXT)
            first = prefill_batch(prompts(9, 3))
            tokens = backend.launch(first).tokens()
            step = sampling_batch(SamplingArrays.zeros(2))
            fed = -1 - step.req_slots if placeholder else tokens
            lengths = first.seq_lens + 1
            tables = first.block_tables
            batch = replace(step, input_ids=fed, positions=lengths - 1, seq_lens=lengths, block_tables=tables)
            results.append(backend.launch(batch).tokens().tolist())
        assert results[0] == results[1]

    @pytest.mark.parametrize("dtype", ["bf16", "f16"])
    def test_half_precision_follows_float32(self, dtype: str) -> None:
        """Up to rounding; a wrong dtype anywhere would fail."""
        model, logits = RandomModel.of("qwen3"), []
        for kind in ("f32", dtype):
            backend = model.on(self.make(kind))
            backend.allocate(64, BLOCK, 4, CONTEXT)
            logits.append(backend.to_host(backend.forward(prefill_batch(prompts(30, 7)))))
        error = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0])
        assert error < 0.08


class Reads(Mapping[str, AnyTensor]):
    """Counts how often each weight is read."""

    def __init__(self, weights: Mapping[str, AnyTensor]) -> None:
        self.weights, self.counts = weights, Counter[str]()

    def __getitem__(self, name: str) -> AnyTensor:
        self.counts[name] += 1
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def assert_logprobs_close(ours: Sequence[TokenLogprobs | None], expected: Sequence[TokenLogprobs | None]) -> None:
    """Equal up to rounding."""
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a is not None
        assert b is not None
        assert a[0] == b[0]
        assert a[1] == pytest.approx(b[1], abs=1e-4)
        assert a[3] == pytest.approx(b[3], abs=1e-4)
