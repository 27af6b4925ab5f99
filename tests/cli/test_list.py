"""`llmrs list`: models in each location, their columns, and broken models."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import texts
from huggingface_hub import constants
from safetensors.numpy import save_file

from llmrs.cli import main
from llmrs.models import demo

COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


@pytest.fixture
def listed(capsys, cache):
    """The entries by (name, revision) that a command line prints."""

    def run(*args):
        assert main(["list", "--json", *map(str, args)]) == 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        entries = [json.loads(line) for line in captured.out.splitlines()]
        return {(e["name"], e["revision"]): e for e in entries}

    return run


def put_into_cache(cache: Path, name: str, model: Path, commit: str = COMMIT, *refs: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / commit)
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return repository


def spoiled(model: Path, target: Path, **config) -> Path:
    shutil.copytree(model, target)
    texts.change(target / "config.json", **config)
    return target


def test_the_bundled_model_is_always_there(listed):
    found = listed()
    assert list(found) == [("demo", "")]
    entry = found["demo", ""]
    assert entry["bytes"] == (demo.FILES / "model.safetensors").stat().st_size
    assert (entry["architecture"], entry["dtype"], entry["where"]) == ("Qwen3ForCausalLM", "bf16", "bundled")
    assert entry["problem"] == ""


def test_models_of_the_cache_by_their_revisions(listed, cache, folder):
    put_into_cache(cache, "o/model", folder, COMMIT, "main", "pr/1")
    put_into_cache(cache, "o/pinned--x", folder, "b" * 40)
    (cache / "datasets--o--d" / "snapshots" / COMMIT).mkdir(parents=True)
    found = listed()
    assert set(found) == {("demo", ""), ("o/model", "main"), ("o/model", "pr/1"), ("o/pinned--x", "b" * 40)}
    entry = found["o/model", "main"]
    assert (entry["where"], entry["dtype"], entry["problem"]) == ("cache", "f32", "")
    assert entry["bytes"] == (folder / "model.safetensors").stat().st_size


def test_local_models_here_and_in_models(listed, folder):
    shutil.copytree(folder, "one")
    shutil.copytree(folder, "models/two")
    shutil.copytree(folder, "deeper/down/three")
    os.makedirs("empty")
    assert set(listed()) == {("demo", ""), ("one", ""), (os.path.join("models", "two"), "")}
    assert set(listed("deeper/down")) == {("demo", ""), (os.path.join("deeper", "down", "three"), "")}
    assert set(listed(folder)) == {("demo", ""), (str(folder), "")}


def test_a_sharded_model_in_half_precision(listed, folder):
    shutil.copytree(folder, "m")
    os.remove("m/model.safetensors")
    for n in (1, 2):
        save_file({f"w{n}": np.zeros((4, n), np.float16), f"x{n}": np.zeros(1, np.float32)}, f"m/{n}.safetensors")
    table = {"w1": "1.safetensors", "x1": "1.safetensors", "w2": "2.safetensors", "x2": "2.safetensors"}
    Path("m/model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    entry = listed()["m", ""]
    assert entry["dtype"] == "f16"
    assert entry["bytes"] == sum(os.path.getsize(f"m/{n}.safetensors") for n in (1, 2))


def test_models_that_cannot_run_are_listed_with_the_reason(listed, cache, folder):
    put_into_cache(cache, "o/strange", spoiled(folder, Path("strange"), architectures=["StrangeModel"]))
    put_into_cache(cache, "o/nothing", Path("strange")).joinpath("snapshots", COMMIT, "config.json").unlink()
    spoiled(folder, Path("quantized"), quantization_config={"quant_method": "awq"})
    spoiled(folder, Path("cut"))
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(5000)
    spoiled(folder, Path("broken")).joinpath("config.json").write_bytes(b"\xff{")
    spoiled(folder, Path("half")).joinpath("tokenizer.json").unlink()
    found = {name: e for (name, _), e in listed().items()}
    words = {
        "o/strange": "architecture 'StrangeModel' is not supported",
        "o/nothing": "there is no file config.json",
        "strange": "StrangeModel",
        "quantized": "awq",
        "cut": "model.safetensors can't be read",
        "broken": "config.json is not text",
        "half": "it lacks tokenizer.json",
        "demo": "",
    }
    assert set(found) == set(words)
    for name, problem in words.items():
        assert problem in found[name]["problem"]
        assert bool(found[name]["problem"]) == bool(problem)
        assert str(Path().resolve()) not in found[name]["problem"]
    assert found["strange"]["architecture"] == "StrangeModel"
    assert found["strange"]["bytes"] > 0


def test_entries_that_are_no_entries(listed, cache):
    cache.mkdir()
    (cache / "models--a--file").write_text("a file")
    repository = cache / "models--a--b"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").write_text("a file, not a folder")
    (repository / "snapshots" / COMMIT).symlink_to("nowhere")
    loop = cache / "models--a--loop"
    loop.symlink_to(loop)
    assert set(listed()) == {("demo", "")}


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_folders_that_may_not_be_read(listed, folder):
    shutil.copytree(folder, "secret")
    os.chmod("secret", 0)
    try:
        assert set(listed()) == {("demo", "")}
    finally:
        os.chmod("secret", 0o700)


def test_the_table(capsys, cache, folder):
    put_into_cache(cache, "o/model", folder, COMMIT, "v1")
    spoiled(folder, Path("bad"), architectures=["\x1b[31mFoo\nBar"])
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].split() == ["model", "weights", "architecture", "dtype", "location"]
    assert lines[1].split() == ["demo", "7.35", "MB", "Qwen3", "bf16", "bundled"]
    assert lines[2].endswith("Hugging Face cache, revision v1")
    assert "can't run: architecture" in lines[3]
    assert len(lines) == 4
    assert "\x1b" not in out


def test_a_folder_that_is_not_there(capsys, cache):
    assert main(["list", "nowhere"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: there is no folder nowhere\nhint: ")
    os.makedirs("empty")
    assert main(["list", "empty"]) == 0
    assert "note: empty holds no models" in capsys.readouterr().err
