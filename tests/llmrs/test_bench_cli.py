"""`llmrs bench` as a command, on the demo model."""

import json
import re
from functools import partial

import pytest

from llmrs import Engine, EngineConfig
from llmrs.backends.torch import cpu_linear
from llmrs.backends.torch.cpu.library import libraries
from llmrs.backends.torch.cpu_linear import Forms
from llmrs.bench import startup
from llmrs.bench.roofline import Device
from llmrs.bench.serving import device_idle
from llmrs.bench.startup import process_error
from llmrs.bench.sweep import sweep
from llmrs.cli import main

DEVICE = Device("synthetic", 1e9, 1e12)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def bench(*args: str) -> tuple[int, str, str]:
        status = main(["bench", "--device", "cpu", *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return bench


def test_everything_in_one_command(call, tmp_path):
    shapes = ["--batches", "1,2", "--contexts", "16", "--contexts", "9999"]
    status, out, _ = call(
        "--workloads", "mixed,prefill", "--arrivals", "2", "--scale", "0.01", "--plot", "a.svg", *shapes
    )
    assert status == 0
    for words in ("GB/s read", "scaled: 0.01 of", "TTFT p50", "mixed at 2", "not run: the context has"):
        assert words in out
    assert re.search(r"^mixed +3 +\d+ +[\d.]+ +[\d.]+ +[\d.]+ % +-$", out, re.M)
    assert (tmp_path / "a.svg").exists()


@pytest.mark.parametrize(
    "forms", [Forms(packed=False, plain_max_m=8), Forms(packed=False, plain_max_m=8, gemv_max_m=8)]
)
def test_profile_as_json(forms, call, monkeypatch):
    """With torch's ops, and with kernels of our own, whose steps are recorded otherwise."""
    if forms.gemv_max_m and not libraries():
        pytest.skip("no CPU kernels were compiled")
    monkeypatch.setattr(cpu_linear, "measured", lambda *how: forms)
    (found,) = json.loads(call("--profile", "--batches", "2", "--contexts", "16", "--json")[1])["profiles"]
    head = next(k for k in found["kernels"] if k["what"].startswith("lm_head"))
    assert head["count"] == 1
    assert head["roofline_time"] > 0
    assert found["busy"] > 0
    assert any(k["roofline_time"] is None for k in found["kernels"])


def test_workloads_as_json(call):
    found = json.loads(call("--workloads", "single", "--scale", "0.02", "--json")[1])
    assert found["scale"] == 0.02
    (single,) = found["workloads"]
    assert single["tokens"] == 10
    assert single["tokens_per_second"] == pytest.approx(10 / single["seconds"])
    assert single["fraction_of_roofline"] == pytest.approx(single["roofline_time"] / single["seconds"])
    assert single["idle"] is None


def test_a_backend_without_a_profiler(call):
    status, out, err = call("--backend", "reference", "--profile", "--batches", "1", "--contexts", "8")
    assert (status, out) == (2, "")
    assert "reference has no profiler" in err
    with Engine(EngineConfig("demo", backend="reference", max_num_seqs=1, max_model_len=8)) as reference:
        assert device_idle(reference, [], 1.0) is None
        (cell,) = sweep(reference, DEVICE, [1], [8])
    assert (cell.idle, cell.skipped) == (None, "")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--workloads", "sead"], "did you mean seed"),
        (["--workloads", ""], "'' is unknown"),
        (["--workloads", "seed", "--batches", "3"], "batches has no effect"),
        (["--scale", "0.5"], "scale has no effect"),
        (["--contexts", "8", "--new-tokens", "9"], "new_tokens has no effect"),
        (["--host", "--profile"], "excludes other measurements: profile"),
        (["--arrivals", "0"], "arrivals: 0.0"),
        (["--arrivals", "1,x"], "'x'"),
        (["--batches", "1,,2"], "''"),
        (["--plot", "/nowhere/a.svg"], "/nowhere/a.svg can't be written"),
        (["--workloads", "seed", "--max-model-len", "100"], "1024 tokens of prompt and answer are more than"),
        (["--workloads", "prefill"], "4097 tokens of prompt and answer are more than the context of 4096"),
        (["--profile", "--batches", "1", "--contexts", "5000"], "a step of 1 x 5000"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors(call, args, words):
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert words in err
    assert "\nhint: " in err


def test_startup(monkeypatch, call):
    monkeypatch.setattr("llmrs.bench.startup.measure", partial(startup.measure, rounds=1))
    (found,) = json.loads(call("--start", "--json", "--backend", "reference", "--max-model-len", "64")[1])["start"]
    assert min(found["first_token"], found["imported"], found["loaded"], found["answered"]) > 0
    assert "it was this" in process_error(2, b"noise\nerror: it was this\nhint: no\n").message
