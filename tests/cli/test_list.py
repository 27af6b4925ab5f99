"""`llmrs list`: models in each location, their columns, and broken models."""

import json
import os
import shutil
import sys
from pathlib import Path

import gguf_files
import gguf_models
import numpy as np
import pytest
import quantized_files
import texts
from huggingface_hub import constants
from safetensors.numpy import save_file
from safetensors.torch import load_file

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


def test_gguf_files_here_and_in_folders(listed, folder):
    for path, kind, file_type in (("a.gguf", "F16", 1), ("models/b.gguf", "F32", 0), ("c/d.gguf", "BF16", None)):
        Path(path).parent.mkdir(exist_ok=True)
        gguf_models.write(folder, Path(path), kind, file_type=file_type)
    gguf_models.write(folder, Path("c/e.gguf"), "F16", file_type=15, split_max_tensors=15)  # the mix is what it says
    Path("c/mmproj-F16.gguf").write_bytes(b"GGUF")
    found = {name: e for (name, _), e in listed().items() if name != "demo"}
    types = {"a.gguf": "f16", os.path.join("models", "b.gguf"): "f32", os.path.join("c", "d.gguf"): "bf16",
             os.path.join("c", "e-00001-of-00003.gguf"): "Q4_K_M"}  # fmt: skip
    assert {n: e["dtype"] for n, e in found.items()} == types
    for name, e in found.items():
        assert (e["architecture"], e["where"], e["problem"]) == ("Qwen3ForCausalLM", "folder", "")
        files = Path("c").glob("e-*") if "e-" in name else [Path(name)]
        assert e["bytes"] == sum(f.stat().st_size for f in files)
        assert (32 if "b.gguf" in name else 16) <= e["bits_per_weight"] <= (32 if "b.gguf" in name else 16.2)
    assert set(listed("c/d.gguf", "models")) == {("demo", ""), ("c/d.gguf", ""), (os.path.join("models", "b.gguf"), "")}


def test_gguf_files_of_the_cache_by_their_tags(listed, cache, folder, call):
    model = Path("snapshot")
    (model / "Q4_K_M").mkdir(parents=True)
    for file in ("x-F16.gguf", "y-BF16.gguf", "Q4_K_M/x-Q4_K_M.gguf", "a.gguf", "z-bf16.gguf"):
        gguf_models.write(folder, model / file, "F16")
    put_into_cache(cache, "o/m", model, COMMIT, "main", "v1")
    shutil.rmtree(model)
    names = ["o/m:F16", "o/m/y-BF16.gguf", "o/m/z-bf16.gguf", "o/m:Q4_K_M", "o/m/a.gguf"]
    assert set(listed()) == {("demo", ""), *((n, r) for n in names for r in ("main", "v1"))}
    assert [call("graph", n, "--offline")[0] for n in names] == [0] * 5  # each is the name of that model


def test_gguf_files_that_cannot_run_are_listed_with_the_reason(listed, folder):
    good = gguf_models.write(folder, Path("good.gguf"), "F16").read_bytes()
    text = gguf_files.text
    broken = {
        "empty": (b"", "it is empty"), "html": (b"<html>", "it is no GGUF file"),
        "cut": (good[:-4000], "and the file has"),
        "cut-00001-of-00002": (good, "there is no file cut-00002-of-00002.gguf"),
        "family": (good.replace(b"qwen3", b"qwen9"), "general.architecture is 'qwen9', which is not supported"),
        "words": (good.replace(text("gpt2"), text("gpt9")), "tokenizer.ggml.model is 'gpt9'"),
        "pieces": (good.replace(text("gpt-2"), text("gpt-9")), "tokenizer.ggml.pre is 'gpt-9'"),
        "nothing": (gguf_files.build(), "general.architecture is None"),
    }  # fmt: skip
    for name, (data, _) in broken.items():
        Path(f"{name}.gguf").write_bytes(data)
    os.symlink("nowhere", "link.gguf")
    found = {name.removesuffix(".gguf"): e for (name, _), e in listed().items()}
    assert set(found) == {"demo", "good", "link", *broken}
    assert (found["demo"]["problem"], found["good"]["problem"]) == ("", "")
    assert found["link"]["problem"]
    for name, (_, problem) in broken.items():
        assert problem in found[name]["problem"]
        assert not found[name]["problem"].startswith((f"{name}.gguf", "/"))
    assert (found["family"]["architecture"], found["family"]["dtype"]) == ("qwen9", "f16")


@pytest.mark.parametrize(("name", "format"), [
    ("gptq4", "gptq4_g32"), ("awq", "awq4_g16"), ("fp8", "fp8_24x32"), ("fp8-ct-channel", "fp8_channel"),
    ("nvfp4-ct", "nvfp4"), ("int8", "int8_g16"), ("mlx4-g32-bfloat16", "mlx4_g32"), ("mlx-mxfp4", "mxfp4"),
])  # fmt: skip
def test_quantized_folders(listed, call, folder, name, format):
    if name not in quantized_files.FILES:
        pytest.skip("mlx is missing")
    quantized_files.quantize_folder(folder, Path(), name)
    shutil.rmtree("dense")
    entry = listed()["packed", ""]
    assert (entry["dtype"], entry["problem"]) == (format, "")
    stored, weights = (
        sum(t.nbytes for t in load_file(f / "model.safetensors").values()) for f in (Path("packed"), folder)
    )
    assert weights / 4 * entry["bits_per_weight"] / 8 == pytest.approx(stored, rel=1e-3)  # f32; scales of activations
    out = call("graph", Path("packed").resolve())[1].splitlines()[1]
    assert out.startswith("weights: ")
    assert f"{format} 21 tensors" in out


def test_entries_that_are_no_entries(listed, cache):
    cache.mkdir()
    (cache / "models--a--file").write_text("a file")
    repository = cache / "models--a--b"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").write_text("a file, not a folder")
    (repository / "snapshots" / COMMIT).symlink_to("nowhere")
    (cache / "models--a--refused" / "snapshots" / COMMIT).mkdir(parents=True)
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
    assert lines[0].split() == ["model", "weights", "architecture", "dtype", "bits", "location"]
    assert lines[1].split() == ["demo", "7.35", "MB", "Qwen3", "bf16", "16.00", "bundled"]
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
