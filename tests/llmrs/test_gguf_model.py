"""A .gguf file wherever a model is named: command line, config file, Python, the examples."""

import io
import json
import subprocess
import sys
from pathlib import Path

import gguf_models
import llama_cpp
import pytest

from llmrs import Engine, EngineConfig, Message, SamplingParams
from llmrs.models import demo

ROOT = Path(__file__).parents[2]
QUESTION, ANSWER = "What is 7 + 5?", "7 + 5 = 12."
QUICK = ["--dtype", "f32", "--temperature", "0", "--max-tokens", "16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bundled model as files: in float32, and so as a split set."""
    folder = tmp_path_factory.mktemp("made")
    gguf_models.write(demo.FILES, folder / "demo-F32.gguf")
    gguf_models.write(demo.FILES, folder / "demo-Q4_0.gguf", "Q4_0", split_max_tensors=20)
    return folder


@pytest.fixture(scope="module")
def q2k(made):
    """By llama.cpp's quantizer."""
    llama_cpp.require_llama_cpp()
    file = made / "q2k" / "demo-Q2_K.gguf"
    file.parent.mkdir()
    llama_cpp.quantize(made / "demo-F32.gguf", {file: "q2_k"})
    return file


def greedy(model, prompt=None, count=24):
    with Engine(EngineConfig(model_path=model, dtype="f32")) as engine:
        prompt = prompt or engine.apply_chat_template([Message("user", QUESTION)])
        return engine.generate_sync(SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True), [prompt])[
            0
        ].token_ids


def test_the_same_model_gives_the_same_tokens(made):
    assert greedy(made / "demo-F32.gguf") == greedy("demo")
    assert greedy(made / "demo-F32.gguf", "llmrs is", 64) == greedy("demo", "llmrs is", 64)


def test_run_and_chat(call, made, monkeypatch):
    for model in (made / "demo-F32.gguf", made / "demo-Q4_0-00002-of-00003.gguf", f"{made}:q4_0"):
        status, out, err = call("run", "--model", model, "--prompts", QUESTION, *QUICK)
        assert (status, out) == (0, f"{ANSWER}\n"), err
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    status, out, err = call("chat", "--w", made / "demo-F32.gguf", *QUICK)
    assert status == 0, err
    assert ANSWER in out


@pytest.mark.parametrize("model", ["made/demo-F32.gguf", "made:Q4_0"])
def test_a_relative_path_in_a_config_file(call, made, tmp_path, model):
    """Of the current folder, else of the file's."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "made").symlink_to(made)
    settings = {"model": model, "prompts": [QUESTION], "temperature": 0, "max_tokens": 16}
    (tmp_path / "configs" / "c.yaml").write_text(json.dumps(settings))
    assert call("run", "configs/c.yaml")[:2] == (0, f"{ANSWER}\n")


def test_graph_and_bench(call, made):
    plain, ours = (call("graph", m)[1].splitlines() for m in ("demo", made / "demo-Q4_0-00001-of-00003.gguf"))
    assert ours[0] == plain[0]
    assert ours[1] == "weights: q4_0 29 tensors 2.06 MB, f32 17 tensors 11.26 kB"
    assert plain[1] == "weights: bf16 46 tensors 7.35 MB"
    assert len(ours) == len(plain)
    args = ["--batches", "1", "--prompt-tokens", "8", "--new-tokens", "4", "--json"]
    status, out, err = call("bench", "--model", made / "demo-F32.gguf", *args)
    assert status == 0, err
    assert json.loads(out)["results"]


def test_a_file_of_the_model_is_not_overwritten(call, made):
    before = (made / "demo-Q4_0-00003-of-00003.gguf").read_bytes()
    for model in (made / "demo-Q4_0-00001-of-00003.gguf", f"{made}:Q4_0"):
        args = ["run", "--model", model, "--prompts", "a", "--output", made / "demo-Q4_0-00003-of-00003.gguf"]
        status, _, err = call(*args)
        assert status == 2
        assert "is a file of the model" in err
    assert (made / "demo-Q4_0-00003-of-00003.gguf").read_bytes() == before


def test_q2_k_of_llama_cpp(q2k):
    """The same tokens as there."""
    (prompt,) = llama_cpp.tokenize(q2k, ["llmrs is"])
    assert [list(greedy(q2k, "llmrs is", 64))] == llama_cpp.greedy(q2k, [prompt], 64)


@pytest.mark.parametrize("kind", ["q4_0", "q2_k"])
def test_the_example_of_the_readme(made, kind, request):
    file = made / "demo-Q4_0-00001-of-00003.gguf" if kind == "q4_0" else request.getfixturevalue("q2k")
    readme = (ROOT / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    code = readme.replace('model_path="demo"', f"model_path={str(file)!r}")
    assert code != readme
    assert run("-c", code).stdout.strip()


def test_the_examples(q2k):
    done = run("examples/completion.py", str(q2k), "llmrs is")
    assert done.stdout.startswith("llmrs is|")
    assert len(done.stdout) > 20
    assert run("examples/chat.py", str(q2k), input="What is llmrs?\n").stdout.strip()


def run(*args, **options):
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr
    return done
