"""The MLX backend: KV writes in place, process-wide state, threads, ops."""

import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from importlib.metadata import requires
from types import ModuleType

import numpy as np
import pytest

from llmrs import Engine, SamplingParams
from llmrs.backends import base
from llmrs.backends.testing import BLOCK, CONTEXT, MODELS, RandomModel, core_on, prefill_batch, prompts, request, run
from llmrs.cli import main
from llmrs.config import EngineConfig
from llmrs.core.errors import BackendError, LoadCancelledError, MemoryLimitError
from llmrs.loading import make_backend
from llmrs.memory import kv_bytes_per_token

mx = pytest.importorskip("mlx.core")

import bench_mlx_lm  # noqa: E402

from llmrs.backends.mlx import MIN_MLX, ops, streams  # noqa: E402
from llmrs.backends.mlx.backend import MlxBackend  # noqa: E402
from llmrs.backends.mlx.kernels.launch import Kernels  # noqa: E402

BLOCKS = 16_000


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for a CPU with g++")


def make(dtype="f32", kv_dtype=None, kind=MlxBackend, compiles=False):
    backend = kind("cpu", dtype, kv_dtype or dtype)
    backend.use_compile = compiles
    return backend


def logits(backend, model):
    model.on(backend).allocate(100, BLOCK, 8, CONTEXT)
    return backend.to_host(backend.forward(prefill_batch(prompts(1, 9, 30))))


@pytest.mark.parametrize(
    ("chunk", "compiles"),
    [(64, False), (4, False), pytest.param(64, True, marks=needs_compiler)],
    ids=["decode", "mixed", "compiled"],
)
def test_memory_does_not_grow_with_steps(chunk, compiles):
    """A copy of one layer's KV cache would show: the cache is nearly all of the memory."""
    backend = RandomModel.of("qwen3").on(make(compiles=compiles))
    core = core_on(backend, blocks=BLOCKS, max_num_batched_tokens=chunk, max_num_seqs=4, prefix_cache=False)
    mx.synchronize(backend.stream)
    cache = BLOCKS * BLOCK * kv_bytes_per_token(backend.graph, "f32")
    assert mx.get_active_memory() > cache > 80_000_000
    for p in prompts(1, 2, 3, 30):
        core.submit(request(p, max_tokens=220))
    mx.reset_peak_memory()
    peaks = []
    for count in (20, 180):
        for _ in range(count):
            core.step()
        peaks.append(mx.get_peak_memory())
    assert core.scheduler.running
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[0] < cache * 1.05
    backend.close()


def test_later_steps_survive_a_failed_one():
    """It fails halfway through the graph, after some KV writes."""
    backend = RandomModel.of("qwen3").on(make())
    core = core_on(backend)

    def ask():
        return [request(p, max_tokens=12) for p in prompts(9, 5)]

    expected = run(core, ask())
    calls, middle = backend.program.calls, len(backend.program.calls) // 2
    whole, lost = calls[middle], ask()
    for r in lost:
        core.submit(r)
    core.step()
    calls[middle] = whole._replace(run=lambda *inputs: 1 / 0)
    core.step()
    calls[middle] = whole
    assert all(isinstance(r.error, BackendError) for r in lost)
    assert run(core, ask()) == expected
    backend.close()


def test_close_gives_memory_and_limits_back(monkeypatch):
    monkeypatch.setattr(streams, "_leases", [])  # other tests may hold some
    monkeypatch.setattr(streams, "_saved_limits", {})
    monkeypatch.setattr(streams, "working_set", lambda: 10**12)
    gc.collect()  # left by failed tests
    before = mx.get_active_memory()
    limits = mx.get_memory_limit(), mx.set_cache_limit(1 << 20)
    backends = [RandomModel.of("qwen3").on(make()) for _ in range(2)]
    for backend in backends:
        run(core_on(backend), [request(p, max_tokens=5) for p in prompts(9, 3)])
    assert mx.get_active_memory() > before
    backends[0].close()
    assert mx.set_cache_limit(streams.MAX_CACHE_BYTES) > 1 << 20  # one engine is left
    assert mx.get_memory_limit() == 10**12
    backends[1].close()
    backends[1].close()
    assert mx.get_active_memory() == before
    assert (mx.get_memory_limit(), mx.set_cache_limit(limits[1])) == (limits[0], 1 << 20)


@pytest.fixture
def limits(monkeypatch):
    """MLX's memory and wired limits, without engines, on a GPU of the given size or none."""
    monkeypatch.setattr(streams, "_leases", [])
    monkeypatch.setattr(streams, "_saved_limits", {})
    wired = [7]
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: wired.append(limit) or wired[-2])  # needs a GPU

    def use(size):
        monkeypatch.setattr(streams, "working_set", lambda: size)
        return lambda: (mx.get_memory_limit(), wired[-1])

    return use


def with_budget(budget):
    backend = make()
    backend.configure(EngineConfig(memory_limit=budget))
    return backend


def test_limits_are_the_sum_of_the_engines_budgets(limits):
    now = limits(10**12)
    before, own = now(), mx.zeros(10_000)
    mx.eval(own)
    held = mx.get_active_memory()
    assert held > 0
    first = with_budget(3 * 10**8)
    assert now() == (held + 3 * 10**8,) * 2
    second = with_budget(None)
    assert now() == (10**12,) * 2  # no budget
    third = with_budget(2 * 10**8)
    second.close()
    assert now() == (held + 5 * 10**8,) * 2
    first.close()
    assert now() == (held + 2 * 10**8,) * 2
    third.close()
    assert now() == before


def test_limits_are_at_most_the_working_set(limits):
    now = limits(10**9)
    before, backend = now(), with_budget(10**10)
    assert now() == (10**9,) * 2
    backend.close()
    assert now() == before


def test_without_a_gpu_only_budgets_are_limits(limits):
    now = limits(None)
    before, held = now(), mx.get_active_memory()
    first = with_budget(3 * 10**8)
    assert now() == (held + 3 * 10**8, before[1])
    second = with_budget(None)
    assert now() == before
    first.close()
    second.close()
    assert now() == before


def test_a_model_over_the_budget_is_refused_and_leaves_no_limit(limits):
    now = limits(10**12)
    before = now()
    with pytest.raises(MemoryLimitError, match=r"weights need .* memory_limit allows 0\.10 MB; ") as caught:
        Engine(EngineConfig(backend="mlx", device="cpu", memory_limit=100_000))
    enough = int(re.search(r"memory_limit of at least (\d+) ", caught.value.hint)[1])
    gc.collect()
    assert now() == before
    with Engine(EngineConfig(backend="mlx", device="cpu", memory_limit=enough)) as engine:
        assert engine.memory_plan.max_model_len == engine.memory_plan.requested_len
        assert now()[0] < enough + 10**8
        assert len(engine.generate_sync(SamplingParams(max_tokens=3, ignore_eos=True), ["a"])[0].token_ids) == 3
    assert now() == before


def test_a_cancelled_load_frees_memory():
    before = mx.get_active_memory()
    backend, model, done = make(), RandomModel.of("qwen3"), []

    def progress(count):
        done.append(count)
        if len(done) == 5:
            raise LoadCancelledError("enough")

    with pytest.raises(LoadCancelledError):
        backend.load(model.graph, model.weights, progress)
    backend.close()
    assert mx.get_active_memory() == before


def tokens_in_a_thread(results, n):
    """Creates, runs and closes an engine."""
    backend = RandomModel.of("qwen3").on(make())
    results[n] = run(core_on(backend), [request(p, 3, temperature=0.9, max_tokens=30) for p in prompts(9, 20, 5)])
    backend.close()


def system_threads():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else threading.active_count()


def run_threads(count, results):
    threads = [threading.Thread(target=tokens_in_a_thread, args=(results, n)) for n in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def test_concurrent_and_consecutive_engines():
    """One thread each; no thread, stream or limit is left behind."""
    results = {}
    tokens_in_a_thread(results, "here")
    default, limit = mx.default_stream(mx.default_device()), mx.get_memory_limit()
    run_threads(3, results)
    assert [results[n] for n in range(3)] == [results["here"]] * 3
    count = system_threads()
    for n in range(8):
        run_threads(1, again := {})
        assert again[0] == results["here"], n
    assert system_threads() < count + 4  # an ended thread may still be listed
    assert (mx.default_stream(mx.default_device()), mx.get_memory_limit()) == (default, limit)


IMPORT = """
import mlx.core as mx
before = mx.get_memory_limit(), mx.set_cache_limit(12345), mx.default_device()
import llmrs.backends.mlx.backend
assert mx.set_cache_limit(before[1]) == 12345
assert mx.get_memory_limit() == before[0] and mx.default_device() == before[2] and mx.get_active_memory() == 0
"""


def test_importing_changes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh(monkeypatch):
    """Reimports the backend with a fake mlx.core."""

    def use(core):
        for name in [n for n in sys.modules if n.startswith("llmrs.backends.mlx")]:
            monkeypatch.delitem(sys.modules, name)
        package = ModuleType("mlx")
        package.core = core
        monkeypatch.setitem(sys.modules, "mlx", package)
        monkeypatch.setitem(sys.modules, "mlx.core", core)

    return use


def old_mlx():
    core = ModuleType("mlx.core")
    core.__version__ = "0.25.1"
    return core


@pytest.mark.parametrize("backend", ["mlx", "auto"])
def test_an_mlx_that_is_too_old(fresh, monkeypatch, backend):
    fresh(old_mlx())
    monkeypatch.setattr(base, "resolve", lambda name: "mlx")  # as on a Mac
    with pytest.raises(BackendError) as caught:
        make_backend(EngineConfig(backend=backend))
    assert caught.value.message == "MLX 0.25.1 is too old; 0.32 or later is needed"
    assert caught.value.hint == "pip install -U mlx"


@pytest.mark.parametrize("words", [["bench", "--model", "demo"], ["run", "--model", "demo", "--prompts", "a"]])
def test_the_command_line_with_an_mlx_that_is_too_old(fresh, capsys, words):
    fresh(old_mlx())
    assert main([*words, "--backend", "mlx"]) != 0
    shown = capsys.readouterr().err
    assert "MLX 0.25.1 is too old; 0.32 or later is needed" in shown
    assert "pip install -U mlx" in shown


def test_the_package_requires_the_minimum_mlx():
    wanted = [r for r in requires("llmrs") if r.startswith("mlx")]
    assert wanted
    assert all(">=" + ".".join(map(str, MIN_MLX)) in r for r in wanted)


@pytest.mark.parametrize(
    ("system", "machine", "macos", "hint"),
    [
        ("linux", "x86_64", "", "pip install 'llmrs[mlx]'"),
        ("darwin", "arm64", "15.1", "pip install 'llmrs[mlx]'"),
        ("darwin", "arm64", "13.6.1", "MLX needs macOS 14 or later, and this is 13.6.1; backend: torch runs here"),
        ("darwin", "x86_64", "14.0", "MLX needs Apple silicon, and a Python that is built for it; backend: torch"),
        ("win32", "AMD64", "", "MLX needs macOS or Linux; backend: torch runs here"),
    ],
)
def test_without_mlx_the_error_has_a_hint(fresh, monkeypatch, system, machine, macos, hint):
    fresh(None)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), machine))
    with pytest.raises(BackendError, match="MLX can't be loaded") as caught:
        base.load_backend("mlx")
    assert caught.value.hint.startswith(hint)


@pytest.mark.skipif(mx.metal.is_available(), reason="needs a system without Metal")
def test_a_gpu_without_metal():
    with pytest.raises(BackendError, match="device 'gpu' is not available") as caught:
        make_backend(EngineConfig(backend="mlx", device="gpu"))
    assert caught.value.hint == "backend mlx has: cpu"
    with pytest.raises(BackendError, match="no Metal"):
        MlxBackend("gpu", "f32", "f32")


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [("darwin", "arm64", "mlx"), ("darwin", "x86_64", "torch"), ("linux", "aarch64", "torch")],
)
def test_auto_backend(monkeypatch, system, machine, expected):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(base.platform, "machine", lambda: machine)
    assert base.resolve("auto") == expected
    assert base.resolve("reference") == "reference"


def test_free_memory_on_a_gpu(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 10**12})
    assert make().devices() == ["gpu", "cpu"]
    assert make().free_memory() == 10**12 - mx.get_active_memory()


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_compiled_steps_give_the_same_tokens(name, monkeypatch):
    """While requests start and finish, across a key bucket boundary, with mx.fast ops."""
    model = RandomModel.of(name)

    def ask():
        lengths = {4: 90, 11: 30, 30: 60, 58: 20}
        return [request(prompts(n)[0], n, temperature=0.8, max_tokens=count) for n, count in lengths.items()]

    plain, compiled = model.on(make()), make(compiles=True)
    compiled.ops_table = {**ops.COMMON, **ops.FAST}
    model.on(compiled)
    expected = run(core_on(plain, max_num_batched_tokens=32), ask())
    traced, compile_ = [], mx.compile
    monkeypatch.setattr(mx, "compile", lambda f: traced.append(compiled.compiled.shape) or compile_(f))
    assert run(core_on(compiled, max_num_batched_tokens=32), ask()) == expected
    assert len({count for count, _ in traced}) > 1
    assert {keys for _, keys in traced} == {64, 128}
    plain.close()
    gc.collect()
    before = mx.get_active_memory()
    held = sum(w.nbytes for w in model.weights.values())
    compiled.close()
    assert mx.get_active_memory() <= before - held


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_fused_ops_equal_their_definitions(name):
    class Plain(MlxBackend):
        fused_ops = frozenset()

    model = RandomModel.of(name)
    fused, plain = make(), make(kind=Plain)
    results = [logits(b, model) for b in (fused, plain)]
    own = {"llama": "qkv_rope_write_kv", "qwen3": "qkv_norm_rope_write_kv", "gemma3": "merged_linear_gelu_and_mul"}
    used = [{e.op for f in b.graph.functions.values() for e in f.equations} for b in (fused, plain)]
    assert own[name] in used[0]
    assert used[1] <= ops.PLAIN.keys()
    assert np.abs(results[0] - results[1]).max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_gpu_ops_equal_the_common_ones(name):
    """They run on a CPU too."""
    model = RandomModel.of(name)
    common, fast = make(), make()
    fast.ops_table = {**ops.COMMON, **ops.FAST}
    results = [logits(b, model) for b in (common, fast)]
    assert np.abs(results[0] - results[1]).max() < 1e-4


def test_a_kv_cache_of_another_dtype():
    model = RandomModel.of("qwen3")
    exact, rounded = logits(make(), model), logits(make(kv_dtype="f16"), model)
    error = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    assert 0 < error < 0.02


def test_ops_per_layer_on_metal():
    counts = bench_mlx_lm.per_layer()
    assert counts["Metal kernels"] == 5  # norm_rope, attention, act_and_mul, fused_add_rms_norm twice
    assert counts["MLX primitives"] >= 6  # at least four GEMMs and two scatters


def test_the_error_of_a_metal_kernel_names_it():

    def make(name, **_):
        def launch(**_):
            raise RuntimeError("program_source:7: error: use of undeclared identifier")

        return launch

    backend = MlxBackend("cpu", "f32", "f32")
    backend.use_metal(Kernels(make))
    RandomModel.of("qwen3").on(backend)
    backend.allocate(10, 4, 2, 40)
    with pytest.raises(BackendError, match=r"Metal kernel \w+ can't be run.*undeclared") as caught:
        backend.forward(prefill_batch([[1, 2, 3]]))
    assert "kernels: plain" in caught.value.hint
    backend.close()


def test_the_kernels_option():
    backend = MlxBackend("cpu", "f32", "f32")
    backend.use_compile = True  # as on a Mac's GPU
    backend.use_metal(Kernels())
    backend.configure(EngineConfig())
    assert backend.ops_table["attend"] is not ops.FAST["attend"]
    backend.configure(EngineConfig(kernels="plain"))
    assert backend.ops_table["attend"] is ops.FAST["attend"]
    with pytest.raises(BackendError, match="triton"):
        backend.configure(EngineConfig(kernels="triton"))
    backend.close()
