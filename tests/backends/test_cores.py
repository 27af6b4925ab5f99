"""How many cores and threads are used, and how threads wait."""

import os
import subprocess
import sys

import pytest
import torch

from llmrs import ConfigError, Engine, EngineConfig, SamplingParams
from llmrs.backends import cores
from llmrs.backends.base import load_backend
from llmrs.backends.cores import usable_cores

linux = pytest.mark.skipif(sys.platform != "linux", reason="control groups and GNU's OpenMP are Linux's")


@linux
@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "300000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9000000 100000\n"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu.max": "1 0"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_cores_within_a_containers_quota(tmp_path, monkeypatch, files, most):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == most


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_option_sets_torchs_threads(threads):
    with Engine(EngineConfig("demo", backend="torch", device="cpu", threads=1), "f32") as engine:
        assert engine._worker.run_on_device_thread(lambda backend: torch.get_num_threads()) == 1
        assert engine.generate_sync(SamplingParams(max_tokens=2), ["Hi"])[0].token_ids


def test_without_the_option_a_quota_bounds_them(threads, monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setattr("llmrs.backends.torch.backend.usable_cores", lambda: 1)
    load_backend("torch")("cpu", "f32", "f32").configure(EngineConfig())
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("name", ["reference", "mlx"])
def test_backends_without_a_choice_refuse_the_option(name):
    pytest.importorskip("mlx" if name == "mlx" else "numpy")
    with pytest.raises(ConfigError, match="no choice of threads"):
        load_backend(name)("cpu", "f32", "f32").configure(EngineConfig(threads=2))


def test_steps_on_a_gpu_have_no_threads():
    made = load_backend("torch")("cpu", "f32", "f32")
    made.torch_device = torch.device("cuda:0")
    with pytest.raises(ConfigError, match="threads: steps run on"):
        made.use_threads(2)


LOAD = "import os, llmrs.backends.torch; print(sorted(os.environ.keys() & {'OMP_WAIT_POLICY'}))"


@linux
@pytest.mark.parametrize(
    ("code", "given", "spins", "kept"),
    [
        (LOAD, {}, "0", "[]"),
        (LOAD, {"OMP_WAIT_POLICY": "active"}, "30000000000", "['OMP_WAIT_POLICY']"),
        (LOAD, {"GOMP_SPINCOUNT": "77"}, "77", "[]"),
        (f"import torch; {LOAD}", {}, "300000", "[]"),
    ],
)
def test_torchs_threads_sleep_while_they_wait(code, given, spins, kept):
    """How often they look before they sleep, as torch's OpenMP library prints it. What the user has set holds, and a
    torch that is loaded already stays as it is; the environment is as it was."""
    env = {**{k: v for k, v in os.environ.items() if k not in cores.WAITING}, **given, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch comes with another OpenMP library than GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert done.stdout.strip() == kept
