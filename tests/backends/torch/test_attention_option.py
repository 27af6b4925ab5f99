"""The option `attention`: torch's own and flash-attn's in the kernel's place, and who refuses what."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.reference import ops
from llmrs.backends.testing import MODELS, RandomModel, core_on, prefill_batch, prompts, request, run
from llmrs.cli.settings import load_settings
from llmrs.core.config import EngineConfig
from llmrs.core.errors import BackendError, ConfigError

pytest.importorskip("triton")
from attention_cases import pool, step

from llmrs.backends.torch.kernels.gather import gather
from llmrs.backends.torch.library import Flash, Sdpa, parts_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class StandIn:
    """flash_attn_varlen_func in plain torch, which keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.calls = []

    def flash_attn_varlen_func(self, q, k, v, **how):
        self.calls.append({"q": q, "k": k, **how})
        starts, key_starts = how["cu_seqlens_q"].tolist(), how["cu_seqlens_k"].tolist()
        assert how["cu_seqlens_q"].dtype == how["cu_seqlens_k"].dtype == torch.int32
        assert (starts[-1], key_starts[-1]) == (len(q), len(k))
        assert how["max_seqlen_q"] == max(np.diff(starts))
        assert how["max_seqlen_k"] == max(np.diff(key_starts))
        assert how["causal"]
        y = torch.empty_like(q)
        for n in range(len(starts) - 1):
            rows, keys = slice(*starts[n : n + 2]), slice(*key_starts[n : n + 2])
            y[rows] = one(q[rows], k[keys], v[keys], how["softmax_scale"], *how["window_size"])
        return y


def one(q, k, v, scale: float, left: int, right: int) -> torch.Tensor:
    """One sequence, causal from the last key on; `left` keys are seen before a row's own, and -1 is all."""
    assert right == (0 if left >= 0 else -1)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    distance = torch.arange(len(k) - len(q), len(k))[:, None].to(q.device) - torch.arange(len(k)).to(q.device)
    hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
    scores = torch.einsum("nhd,lhd->hnl", q, k) * scale
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.fixture
def flash(monkeypatch):
    """flash-attn as if it were installed."""
    made = StandIn()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn", made)
    monkeypatch.setattr(Flash, "check", lambda *_: None)  # float32 is what tests compute in
    return made


def backend(attention: str, name: str = "qwen3", **changes):
    made = load_backend("torch")(f"{DEVICE}:0" if DEVICE == "cuda" else DEVICE, "f32", "f32")
    made.use_kernels("triton", graphs=False, attention=attention)
    return RandomModel.of(name, num_hidden_layers=2, **changes).on(made)


@pytest.mark.parametrize("library", [Sdpa, Flash])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 1, 24), (2, 2, 64), (4, 1, 96)])
def test_ragged_steps(flash, library, heads: int, kv_heads: int, size: int):
    """Singles before, between and after parts of prompts; parts with a cached prefix, alike ones, and windows."""
    rng = np.random.default_rng(size)
    for block_size, window in ((4, 0), (16, 7), (5, 1), (64, 19), (16, 1000)):
        batch = step(rng, [9, 0, 3, 0, 0, 65, 8, 20], [1, 1, 13, 5, 5, 1, 6, 1], block_size)
        kv = pool(rng, batch, block_size, kv_heads, size, torch.float32)
        q = torch.from_numpy(rng.normal(size=(len(batch.input_ids), heads, size))).float()
        p = parts_of(batch, block_size, torch.device(DEVICE))
        assert (p.rows, p.keys) == (slice(2, 32), 16 + 5 + 5 + 66 + 14)
        k, v = gather(*(x.to(DEVICE) for x in kv), p.pieces, p.keys, torch.float32)
        y = library().attend(q[p.rows].to(DEVICE), k, v, p, 0.3, window).flatten(1).cpu().numpy()
        keys, values = (x.numpy() for x in kv)
        wanted = ops.attend(ops.Context(batch, block_size), q.numpy(), ops.KV(keys, values), scale=0.3, window=window)
        assert np.abs(y - wanted[p.rows]).max() < 2e-5, (block_size, window)


def test_what_flash_attn_is_told(flash):
    """Lengths of tokens and of keys, and a window as the keys before a token's own; of all layers alike."""
    ours = backend("flash", "mistral")
    ours.allocate(40, 16, 8, 64)
    ours.forward(prefill_batch(prompts(1, 9, 17), 16))
    assert [c["window_size"] for c in flash.calls] == [(8, 0)] * 2
    assert flash.calls[0]["cu_seqlens_q"].tolist() == flash.calls[0]["cu_seqlens_k"].tolist() == [0, 9, 26]
    assert (flash.calls[0]["max_seqlen_q"], flash.calls[0]["softmax_scale"]) == (17, 8**-0.5)


QUICK = ("qwen3", "gemma3")  # without windows and with them; the others differ in what is not attention


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_answers_are_the_references(flash, name: str):
    """In parts, together with answers under way, and from the prefix cache."""

    def ask():
        return [request(p, max_tokens=4) for p in prompts(1, 9, 30)]

    expected = run(
        core_on(RandomModel.of(name, num_hidden_layers=2).on(load_backend("reference")("cpu", "f32", "f32"))), ask()
    )
    for attention in ("sdpa", "flash"):
        core = core_on(backend(attention, name), max_num_batched_tokens=16)
        assert run(core, ask()) == expected, attention
        assert run(core, ask()) == expected, attention


def test_recorded_steps_keep_the_kernel(monkeypatch):
    monkeypatch.setattr(Sdpa, "attend", None)  # what a call would stumble over
    ours = load_backend("torch")("cuda:0" if DEVICE == "cuda" else "cpu", "f32", "f32")
    ours.use_kernels("triton", graphs=True, attention="sdpa")
    RandomModel.of("qwen3", num_hidden_layers=1).on(ours).allocate(40, 16, 8, 64)
    assert ours.kernels.library is not None
    ours.launch(prefill_batch(prompts(9), 16)).tokens()


def test_early_releases_give_a_tuple(flash, monkeypatch):
    monkeypatch.setattr(flash, "flash_attn_varlen_func", lambda q, *_, **__: (q + 1, None))
    q, p = torch.zeros(2, 1, 8), SimpleNamespace(starts=None, key_starts=None, counts=[(2, 2)])
    assert (Flash().attend(q, q, q, p, 1.0, 0) == 1).all()


def test_without_flash_attn_the_error_says_what_to_install(monkeypatch):
    for name in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendError, match="needs flash-attn") as caught:
        backend("flash")
    assert "pip install flash-attn" in caught.value.hint


def test_flash_refuses_what_it_cannot_do_at_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", StandIn())
    with pytest.raises(BackendError, match="float32"):
        backend("flash")
    graph = RandomModel.of("qwen3", head_dim=260).graph
    with pytest.raises(BackendError, match=f"heads of {graph.name}, which have 260"):
        Flash().check(graph, torch.bfloat16)
    Flash().check(RandomModel.of("qwen3").graph, torch.float16)


def test_libraries_and_a_cache_in_fp8_do_not_go_together():
    made = load_backend("torch")("cpu", "f32", "fp8")
    with pytest.raises(BackendError, match="sdpa does not go with kv_cache_dtype: fp8"):
        made.use_kernels("triton", attention="sdpa")


def test_without_kernels_there_is_torchs_own():
    made = load_backend("torch")("cpu", "f32", "f32")
    made.configure(EngineConfig(attention="sdpa"))
    assert made.kernels is None
    for attention in ("flash", "triton"):
        for kernels in ("auto", "plain"):
            with pytest.raises(BackendError, match=f"attention: {attention} is not there"):
                made.configure(EngineConfig(attention=attention, kernels=kernels))


def test_other_backends_have_no_choice():
    with pytest.raises(ConfigError, match="no choice of attention"):
        load_backend("reference")("cpu", "f32", "f32").configure(EngineConfig(attention="sdpa"))


def test_flash_is_another_word(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("flash: true")
    assert load_settings(str(path), {}).engine.attention == "flash"
    assert load_settings(str(path), {"attention": "flash"}).engine.attention == "flash"
    assert load_settings(str(path), {"flash": False}).engine.attention == "auto"
    for flags in ({"attention": "sdpa"}, {"flash": False, "attention": "flash"}):
        with pytest.raises(ConfigError, match="does not go with attention"):
            load_settings(str(path), flags)


def test_kernels_do_not_load_what_only_libraries_need():
    """torch.nn.attention.bias imports torch._dynamo, which takes longer than torch itself."""
    code = "import sys, llmrs.backends.torch.model_runner; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
