"""Runs every Triton kernel on small, awkward shapes, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck python tests/tools/sanitize.py [CASE ...]

Runs tests of the suite, assertions included; without a GPU in Triton's interpreter. Needs no pytest.
"""

import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # an out-of-bounds read must not hit another tensor

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if find_spec("pytest") is None:  # its decorators leave the tests as they are
    sys.modules["pytest"] = MagicMock(importorskip=import_module)
    sys.modules["pytest"].mark.parametrize = lambda *_, **__: lambda test: test  # type: ignore[attr-defined]

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "backends" / "torch")]
import gemm_cases
import test_elementwise as elementwise
import test_gemm_tma as tma
import test_paged_attention as attention
import test_triton_sampling as sampling

from llmrs.backends.base import load_backend
from llmrs.backends.testing import RandomModel, core_on, prompts, request, run
from llmrs.backends.torch.kernels.gemm_tma import TmaConfig

GPU = torch.cuda.is_available()
TYPES = (torch.float16, torch.bfloat16) if GPU else (torch.float16,)  # the interpreter's bfloat16 is wrong


def attentions() -> None:
    for dtype in TYPES:
        attention.test_ragged_steps(3, 1, 24, dtype)
    attention.test_rows_of_no_tile_stay_as_they_are()
    attention.test_the_config_that_the_gpu_gets()


def by_row() -> None:
    for dtype in TYPES:
        elementwise.test_norms(3, 80, dtype)
        elementwise.test_act_and_mul(4, 1100, dtype)
        elementwise.check_qk_norm_rope_write_kv(3, 1, 24, dtype)
        elementwise.check_qk_norm_rope_write_kv(5, 5, 80, dtype)
        gemm_cases.check_linear(9, 1100, dtype)
    elementwise.test_embed()


def gemms() -> None:
    """Each kernel of gemm.py; the last with split-K too."""
    for dtype in TYPES:
        gemm_cases.check(1, 37, 264, dtype, "silu_and_mul", True, True, True)
        gemm_cases.check(3, 9, 1100, dtype, "gelu_and_mul", True, False, True)
        gemm_cases.check(15, 33, 520, dtype, "silu_and_mul", True, False, True)
        for m, act in ((17, "silu_and_mul"), (65, ""), (33, "gelu_and_mul")):
            gemm_cases.check(m, 65, 264, dtype, act, False, False, True, config=TmaConfig(64, 32, 64))
        tma.test_split_k_and_the_norm_that_reduces_it(33, 9 * 64, 8, 5, dtype)


def sampling_cases() -> None:
    sampling.test_draws(2)
    sampling.test_half_precision_logits_with_strides()
    sampling.test_masked_rows_and_rows_of_nan()
    sampling.test_top_k_top_p_and_min_p(33, True)


def steps() -> None:
    """A model's steps with the device's configs: prefill, then decode."""
    made = load_backend("torch")("cuda:0" if GPU else "cpu", "f16", "f16")
    made.use_kernels("triton", graphs=False)
    asked = [request(prompts(5)[0], max_tokens=2), request(prompts(9)[0], max_tokens=2)]
    found = run(core_on(RandomModel.of("qwen3", num_hidden_layers=1).on(made)), asked)
    assert [len(tokens) for tokens in found] == [2, 2], found


CASES = {f.__name__: f for f in (attentions, by_row, gemms, sampling_cases, steps)}


def main(*names: str) -> None:
    for name in names or CASES:
        begin = time.perf_counter()
        CASES[name]()
        if GPU:
            torch.cuda.synchronize()
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
