"""Launch configs of attention: what is measured, what fits into shared memory, and what importing them costs."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llmrs.backends.testing import RandomModel

pytest.importorskip("triton")
from llmrs.backends.torch.kernel_configs import (
    PRETUNED,
    SM90_CONFIGS,
    ConfigKey,
    Device,
    attn_config,
    prefill_q_tokens,
    smem_bytes,
)
from llmrs.backends.torch.kernels.paged_attention import AttnConfig, default_config

HALF, FLOAT, BF16 = torch.float16, torch.float32, torch.bfloat16
H200 = Device("NVIDIA H200", (9, 0))
ADA = Device("NVIDIA GeForce RTX 4090", (8, 9))
DECODE = ConfigKey(False, 2, 128, HALF, HALF)
PREFILL = ConfigKey(True, 2, 128, HALF, HALF)


@pytest.fixture(autouse=True)
def uncached():
    attn_config.cache_clear()
    yield
    attn_config.cache_clear()


def many_keys():
    for dtype in (BF16, HALF, FLOAT):
        for group in (1, 2, 5, 8, 20):
            for head_dim in (24, 64, 96, 128, 256):
                for prefill in (False, True):
                    yield ConfigKey(prefill, group, head_dim, dtype, dtype)


def default(key: ConfigKey) -> AttnConfig:
    return default_config(key.group, key.head_dim, key.dtype, prefill=key.prefill)


def test_a_device_belongs_to_a_family():
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"):
        assert Device(name, (9, 0)).pretuned is SM90_CONFIGS
    for name in ("NVIDIA H1000", "NVIDIA A100-SXM4-80GB", "cpu"):
        assert Device(name, (9, 0)).pretuned == {}


def test_measured_configs_win_over_defaults(monkeypatch):
    monkeypatch.setitem(PRETUNED, "NVIDIA H200", {DECODE: AttnConfig(1, 32, 2, 2)})
    assert attn_config(DECODE, H200).block_n == 32
    assert attn_config(PREFILL, H200) == default(PREFILL)
    assert attn_config(DECODE, ADA) == default(DECODE)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_config_fits(capability: tuple[int, int]):
    device = Device("some", capability)
    for key in many_keys():
        assert smem_bytes(key, attn_config(key, device), device) <= device.smem_bytes, key


def test_where_there_is_room_the_defaults_are_those_of_the_kernels():
    for key in many_keys():
        if key not in SM90_CONFIGS:
            assert attn_config(key, H200) == default(key)


def test_a_config_that_does_not_fit_loses_stages_first():
    small = Device("NVIDIA RTX", (12, 0))
    config = attn_config(replace(PREFILL, head_dim=256), small)
    assert config.num_stages == 2 < default(replace(PREFILL, head_dim=256)).num_stages


def test_the_prefill_tile_of_a_model_suits_every_layer(monkeypatch):
    graph = RandomModel.of("qwen3").graph
    heads = {tuple(e.inputs[n].type.sizes for n in (0, 1)) for f in graph.functions.values() for e in f.equations
             if e.op == "attend"}  # fmt: skip
    ((q, kv),) = heads
    key = ConfigKey(True, q[0] // kv[0], q[1], HALF, HALF)
    assert prefill_q_tokens(graph, HALF, HALF, H200) == default(key).q_tokens
    monkeypatch.setitem(PRETUNED, "NVIDIA H200", {key: AttnConfig(8, 32, 4, 2)})
    attn_config.cache_clear()
    assert prefill_q_tokens(graph, HALF, HALF, H200) == 8


def test_importing_the_runner_does_not_import_dynamo():
    """torch._dynamo takes longer to import than torch itself."""
    code = "import sys, llmrs.backends.torch.model_runner; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
