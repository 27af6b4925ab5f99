"""Cuts: what is stored and what fits where; the bounded search, with made-up times; and the file that keeps it."""

import json
import os
import sys
from functools import partial

import pytest
import torch

from llmrs.backends.base import load_backend
from llmrs.backends.testing import BLOCK, RandomModel, core_on, prompts, request, run
from llmrs.core.config import EngineConfig
from llmrs.core.errors import BackendError, ConfigError

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from llmrs.backends.torch import model_runner
from llmrs.backends.torch.kernel_configs import HOPPER, STORED, Cuts, Device, Key, attention_key, candidates, default
from llmrs.backends.torch.kernel_configs import shared_memory as needs
from llmrs.backends.torch.kernels.paged_attention import tiling
from llmrs.backends.torch.trials import Trials
from llmrs.backends.torch.tuning import cache_file, keys_of, load, save, search, tune, usable

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
HALF, FLOAT = torch.float16, torch.float32
H200 = Device("NVIDIA H200", (9, 0))
ADA = Device("NVIDIA GeForce RTX 4090", (8, 9))
DECODE = attention_key(2, 128, HALF, HALF, prompt=False)
PROMPT = attention_key(2, 128, HALF, HALF, prompt=True)
KEYS = [DECODE, Key("matvec", (64, 128), (HALF,)), PROMPT]


def many_keys():
    for dtype in (torch.bfloat16, HALF, FLOAT):
        for group in (1, 2, 5, 8, 20):
            for size in (24, 64, 96, 128, 256):
                for prompt in (False, True):
                    yield attention_key(group, size, dtype, dtype, prompt=prompt)


def test_a_device_belongs_to_a_family():
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"):
        assert Device(name, (9, 0)).stored is HOPPER
    for name in ("NVIDIA H1000", "NVIDIA A100-SXM4-80GB", "cpu"):
        assert Device(name, (9, 0)).stored is None


def test_what_is_stored_wins_over_defaults_and_a_choice_over_both(monkeypatch):
    monkeypatch.setitem(STORED, "NVIDIA H200", {str(DECODE): (1, 32, 2, 2)})
    cuts = Cuts(H200)
    assert cuts.tiling(2, 128, HALF, HALF, prompt=False).keys == 32
    assert cuts.tiling(2, 128, HALF, HALF, prompt=True) == tiling(2, 128, HALF, prompt=True)
    cuts.known[DECODE] = (1, 64, 4, 3)
    assert cuts.tiling(2, 128, HALF, HALF, prompt=False).warps == 4
    assert cuts.rows(torch.zeros(4096, 8)) == 8


def test_every_key_of_the_bundled_shapes_is_stored_for_an_h200():
    """The keys that a Qwen3 graph asks for are spelled like those of the table."""
    keys = keys_of(RandomModel.of("qwen3").graph, torch.bfloat16, torch.bfloat16)
    assert {str(k).split()[0] for k in keys} == {k.split()[0] for k in HOPPER}
    assert {str(k).count(" ") for k in keys if k.kernel == "decode"} == {2 + 1}
    assert str(Key("matvec", (1024, 2048), (torch.bfloat16,))) in HOPPER
    assert str(attention_key(2, 128, torch.bfloat16, torch.bfloat16, prompt=True)) in HOPPER


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_defaults_and_candidates_fit(capability: tuple[int, int]):
    device = Device("some", capability)
    for key in many_keys():
        found = candidates(key, device)
        assert found[0] == default(key, device), key
        assert 1 <= len(found) == len(set(found)) <= 5
        assert all(needs(key, cut, device) <= device.shared for cut in found)


def test_where_there_is_room_the_defaults_are_those_of_the_kernels():
    for key in many_keys():
        cut = tiling(*key.shape, key.types[0], prompt=key.kernel == "prompt")
        assert default(key, H200) == (cut.tokens, cut.keys, cut.warps, cut.stages)


class Clock:
    """Time that passes only where a trial takes it."""

    def __init__(self, times, each: float = 1.0):
        self.times, self.each, self.now, self.asked = times, each, 0.0, []

    def __call__(self) -> float:
        return self.now

    def seconds(self, key: Key, cut: tuple[int, ...]) -> float:
        self.asked.append((key, cut))
        self.now += self.each
        found = self.times(key, cut)
        if found is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return found


def searched(times, keys=KEYS, budget=100.0):
    clock = Clock(times)
    found, trials = search(keys, H200, clock.seconds, budget, clock)
    assert [(t.key, t.cut) for t in trials] == clock.asked
    return found, trials


def test_the_fastest_is_chosen():
    best = {key: candidates(key, H200)[-1] for key in KEYS}
    found, trials = searched(lambda key, cut: 1.0 if cut == best[key] else 2.0)
    assert found == best
    assert len(trials) == sum(len(candidates(key, H200)) for key in KEYS)


def test_the_default_stays_where_nothing_is_much_faster():
    first = candidates(DECODE, H200)[0]
    assert searched(lambda key, cut: 1.0 if cut == first else 0.98, [DECODE])[0] == {DECODE: first}
    assert searched(lambda key, cut: 1.0 if cut == first else 0.9, [DECODE])[0] != {DECODE: first}


def test_what_does_not_run_is_passed_over():
    some = candidates(DECODE, H200)
    found, trials = searched(lambda key, cut: None if cut in some[:2] else 1.0 + some.index(cut), [DECODE])
    assert found == {DECODE: some[2]}
    assert [t.seconds is None for t in trials[:3]] == [True, True, False]


def test_where_nothing_runs_nothing_is_chosen():
    found, trials = searched(lambda key, cut: None)
    assert found == {}
    assert all(t.seconds is None and "shared memory" in t.error for t in trials)


def test_the_search_ends_when_the_time_is_spent():
    count = len(candidates(KEYS[0], H200))
    found, trials = searched(lambda key, cut: 1.0, budget=count + 1)
    assert list(found) == [KEYS[0]]  # the second key was begun, and is left as it was
    assert len(trials) == count + 1
    assert searched(lambda key, cut: 1.0, budget=0) == ({}, [])


def tuned(path, times=lambda key, cut: sum(cut), keys=KEYS):
    cuts, clock = Cuts(H200), Clock(times)
    tune(cuts, keys, clock.seconds, path)
    return cuts, clock.asked


def test_what_was_found_is_kept_and_used_again(tmp_path):
    path = tmp_path / "a" / "b" / "cuts.json"
    first, asked = tuned(path, keys=KEYS[:2])
    assert asked
    assert os.listdir(path.parent) == ["cuts.json"]  # nothing is left of writing it
    again, asked = tuned(path, keys=KEYS[:2])
    assert not asked
    assert again.known == first.known
    _, asked = tuned(path)  # another model's keys
    assert {key for key, _ in asked} == {PROMPT}
    assert len(load(path, H200)) == 3


def test_all_that_fails_leaves_the_defaults_and_no_file(tmp_path):
    cuts, asked = tuned(tmp_path / "cuts.json", lambda key, cut: None)
    assert asked
    assert cuts.of(DECODE) == HOPPER["decode 2x128 bfloat16 bfloat16"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"cuts": {}}', b"[" * 90_000, b'{"about": {}, "cuts": {}}', b" " * (2**20 + 1)],
    ids=["empty", "cut off", "no text", "a list", "no device", "deep", "foreign", "long"],
)
def test_a_file_that_is_none_is_ignored(tmp_path, content: bytes):
    path = tmp_path / "cuts.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"cuts\.json is ignored"):
        _, asked = tuned(path)
    assert {key for key, _ in asked} == set(KEYS)
    assert len(load(path, H200)) == 3  # and written anew


def test_the_file_of_another_device_is_ignored(tmp_path):
    path = tmp_path / "cuts.json"
    tuned(path)
    with pytest.warns(UserWarning, match="not the cuts of this device"):
        assert load(path, ADA) == {}
    data = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**data, "cuts": [1]}), "utf-8")
    with pytest.warns(UserWarning, match="is ignored"):
        assert load(path, H200) == {}


@pytest.mark.parametrize("value", [[1, 64, 2, 99], [1, 64], "x", None, 7, {"a": 1}, [1, 64, 2, "3"], ["1" * 9999]])
def test_numbers_that_nobody_tries_are_ignored(tmp_path, value):
    path = tmp_path / "cuts.json"
    save(path, H200, {str(DECODE): value})
    with pytest.warns(UserWarning, match="a stored cut of decode 2x128 float16 float16 is ignored") as caught:
        assert usable(load(path, H200), H200, KEYS) == {}
    assert all(len(str(w.message)) < 200 for w in caught)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        cuts, _ = tuned(tmp_path / "file" / "cuts.json")
    assert set(cuts.known) == set(KEYS)


@pytest.mark.skipif(sys.platform == "win32", reason="has no mkfifo")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "cuts.json")
    with pytest.warns(UserWarning, match="is ignored"):
        assert load(tmp_path / "cuts.json", H200) == {}


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_file(Device("NVIDIA ../A100 \u00e9/x", (8, 0)))
    assert path.parent == tmp_path / "llmrs" / "tuned"
    assert path.name.startswith("NVIDIA_")
    assert cache_file(H200) != cache_file(ADA)


# In the backend


def backend(monkeypatch, tmp_path, dtype: str = "f16", **more):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = load_backend("torch")(DEVICE, dtype, dtype)
    made.use_kernels("triton", **more)
    return RandomModel.of("qwen3", num_hidden_layers=1).on(made)


def test_nothing_is_tuned_unless_asked_for(monkeypatch, tmp_path):
    for tune_it in (None, False):
        made = backend(monkeypatch, tmp_path, tune=tune_it)
        assert made.kernels.tunes == (tune_it is None and made.kernels.cuts.device.unknown)
    made.allocate(10, BLOCK, 2, 40)
    assert not list(tmp_path.iterdir())


def test_a_gpu_of_which_nothing_is_stored_is_tuned(monkeypatch):
    for device, wanted in ((ADA, True), (H200, False)):
        monkeypatch.setattr(Device, "of", lambda _, device=device: device)
        assert model_runner.KernelRunner(torch.device(DEVICE), graphs=False, tune=None).tunes is wanted
        assert model_runner.KernelRunner(torch.device(DEVICE), graphs=False, tune=True).tunes
        assert not model_runner.KernelRunner(torch.device(DEVICE), graphs=False, tune=False).tunes


def test_tuned_steps_give_the_same_tokens(monkeypatch, tmp_path):
    """The search with real launches, once; then its file."""
    count, call = [0], Trials.__call__
    monkeypatch.setattr(Trials, "__call__", lambda self, *of: count.append(count[-1] + 1) or call(self, *of))
    monkeypatch.setattr(model_runner, "tune", partial(tune, budget=1e6))  # the interpreter has all the time there is
    answers, counts = [], []
    for tune_it in (False, True, True):
        made = backend(monkeypatch, tmp_path, "f32", tune=tune_it, graphs=False)
        answers.append(run(core_on(made), [request(p, max_tokens=2) for p in prompts(1, 5)]))
        counts.append(count[-1])
    assert answers[0] == answers[1] == answers[2]
    assert counts[0] == 0 < counts[1] == counts[2]
    assert list((tmp_path / "llmrs" / "tuned").iterdir()) == [cache_file(made.kernels.cuts.device)]


def test_a_trial_of_each_kernel(monkeypatch, tmp_path):
    made = backend(monkeypatch, tmp_path)
    made.allocate(10, BLOCK, 2, 40)
    trials = Trials(made.kv, 2, 40, torch.device(DEVICE))
    for key in keys_of(made.graph, HALF, HALF):
        assert trials(key, candidates(key, made.kernels.cuts.device)[-1]) > 0


def test_tuning_without_kernels_is_refused():
    with pytest.raises(BackendError, match="no Triton kernels"):
        load_backend("torch")("cpu", "f32", "f32").configure(EngineConfig(tune=True))
    with pytest.raises(ConfigError, match="nothing to tune"):
        load_backend("reference")("cpu", "f32", "f32").configure(EngineConfig(tune=True))
