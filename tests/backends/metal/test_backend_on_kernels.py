"""The MLX backend with Metal kernels on the shim vs. with mx ops."""

import sys

import numpy as np
import pytest
from metal_mlx import Shim

from llmrs.backends.base import load_backend
from llmrs.backends.mlx.backend import MlxBackend
from llmrs.backends.mlx.kernels.launch import Kernels
from llmrs.backends.testing import (
    BLOCK,
    CONTEXT,
    FORMS,
    MODELS,
    RandomModel,
    core_on,
    prefill_batch,
    prompts,
    request,
    run,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the shim needs Linux; on a Mac, TestMlx covers the GPU"
)
ALL = {"paged_decode", "paged_prefill", "norm_rope", "fused_add_rms_norm", "act_and_mul"}
MISSING = {  # kernels that a family does not use; attention needs heads of 16 or more
    "mistral": {"paged_decode", "paged_prefill", "norm_rope"},
    "qwen3-moe": {"act_and_mul"},
    "gemma3": {"fused_add_rms_norm"},
}
SAMPLING = {"find_thresholds", "sample_gumbel", "reduce_argmax"}


def on_shim(model, dtype="f32", kv_dtype="f32"):
    shim, backend = Shim(), MlxBackend("cpu", dtype, kv_dtype)
    backend.use_metal(Kernels(shim))
    return model.on(backend), shim


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_tokens(name):
    """A prefill, then mixed steps, greedy and random."""
    model = RandomModel.of(name, num_hidden_layers=7 if name == "gemma3" else 2)
    plain = model.on(MlxBackend("cpu", "f32", "f32"))
    metal, shim = on_shim(model)
    logits = []
    for backend in (plain, metal):
        backend.allocate(100, BLOCK, 8, CONTEXT)
        logits.append(backend.to_host(backend.forward(prefill_batch(prompts(1, BLOCK + 1, 23)))))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4

    def ask():
        sampled = [request(p, n, temperature=0.8, top_p=0.9, max_tokens=4) for n, p in enumerate(prompts(7, 19))]
        return [request(prompts(3)[0], max_tokens=6), *sampled]

    outputs = [run(core_on(b, max_num_batched_tokens=12), ask()) for b in (plain, metal)]
    assert outputs[0] == outputs[1]
    called = {c.removeprefix("llmrs_") for c in shim.calls}
    assert (ALL | SAMPLING) - MISSING.get(name, set()) <= called
    plain.close()
    metal.close()


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("f16", "f16"), ("f32", "f16")], ids="-".join)
def test_half_precision(name, dtypes):
    """As close to float32 as mx ops, up to a factor."""
    model = RandomModel.of(name, num_hidden_layers=2)
    exact, plain = (model.on(MlxBackend("cpu", *types)) for types in (("f32", "f32"), dtypes))
    metal, shim = on_shim(model, *dtypes)
    logits = []
    for backend in (exact, plain, metal):
        backend.allocate(100, BLOCK, 8, CONTEXT)
        first = backend.to_host(backend.forward(prefill_batch(prompts(1, 9, 23))))
        logits.append(np.concatenate([first, backend.to_host(backend.forward(prefill_batch(prompts(1))))]))
    errors = [np.linalg.norm(f - logits[0]) / np.linalg.norm(logits[0]) for f in logits[1:]]
    assert 0 < errors[1] < 1.5 * errors[0]
    assert "llmrs_paged_decode" in shim.calls
    for backend in (exact, plain, metal):
        backend.close()


@pytest.mark.parametrize("forms", [FORMS[1], FORMS[3], FORMS[4]], ids=lambda f: "+".join(str(x) for x, _ in f))
def test_quantized_weights(forms):
    """Logits and greedy tokens of the reference: tables, merged matrices, heads in forms that MLX has no kernel for."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    model = RandomModel.of("qwen3", **sizes, tie_word_embeddings=forms is FORMS[1]).quantized(*forms)
    logits, tokens = [], []
    reference, (metal, shim) = model.on(load_backend("reference")("cpu", "f32", "f32")), on_shim(model)
    for backend in (reference, metal):
        core = core_on(backend)
        logits.append(backend.to_host(backend.forward(prefill_batch(prompts(1, 9, 21)))))
        tokens.append(run(core, [request(p, max_tokens=4) for p in prompts(3, 11)]))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()
    assert tokens[0] == tokens[1]
    assert {"llmrs_quant_gemv", "llmrs_quant_gemm", "llmrs_quant_embed"} <= set(shim.calls)
    metal.close()


def test_quantized_experts():
    shapes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    model, logits = RandomModel.of("qwen3-moe", **shapes).quantized(*FORMS[1]), []
    reference, (metal, shim) = model.on(load_backend("reference")("cpu", "f32", "f32")), on_shim(model)
    for backend in (reference, metal):
        backend.allocate(100, BLOCK, 8, CONTEXT)
        logits.append(backend.to_host(backend.forward(prefill_batch(prompts(1, 4)))))
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()
    assert shim.calls.count("llmrs_quant_gemv") >= 3
    metal.close()
