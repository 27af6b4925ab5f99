"""Options of a command: outputs over other files, flags without effect, hints."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import texts

QUICK = ["--dtype", "f32", "--max-tokens", "6", "--temperature", "0"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "--prompts", "p.jsonl", "--output", "p.jsonl"], "output: p.jsonl is the file of prompts"),
        (["run", "--prompts", "p.jsonl", "--output", "hard.jsonl"], "is the file of prompts p.jsonl"),
        (["run", "--prompts", "soft.jsonl", "--trace", "here/../p.jsonl"], "is the file of prompts soft.jsonl"),
        (["run", "c.yaml", "--output", "p.jsonl"], "is the file of prompts p.jsonl"),
        (["run", "c.yaml", "--output", "c.yaml"], "output: c.yaml is the config file"),
        (["chat", "c.yaml", "--trace", "c.yaml"], "trace: c.yaml is the config file"),
        (["bench", "c.yaml", "--plot", "c.yaml"], "plot: c.yaml is the config file"),
        (["run", "c.yaml", "--output", "new", "--trace", "here/../new"], "is the file of output too"),
        (["run", "c.yaml", "--output", "here"], "here can't be written"),
        (["run", "c.yaml", "--output", "none/new"], "none/new can't be written"),
        (["run", "c.yaml", "--output", "model/config.json"], "config.json is a file of the model"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_an_output_over_another_file_of_the_command(call, tmp_path, folder, args, words):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "here").mkdir()
    (tmp_path / "p.jsonl").write_text('"Hello"\n')
    (tmp_path / "c.yaml").write_text("prompts: p.jsonl\nmodel: model\n")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "p.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("p.jsonl")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert "error: " in err
    assert words in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_an_output_over_the_standard_input(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("Hello\n")
    command = [sys.executable, "-m", "llmrs", "run", "--prompts", "-", "--output", str(file)]
    with file.open() as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=60)
    assert "is the file of prompts on standard input" in done.stderr
    assert (done.returncode, file.read_text()) == (2, "Hello\n")


UNUSED = [
    (["run", "--prompts", "a", "--logprobs", "2"], "logprobs: text holds no log probabilities"),
    (["run", "--prompts", "a", "--prompt-logprobs", "0"], "prompt_logprobs: text holds"),
    (["run", "--prompts", "a", "--priority", "2"], "priority: all requests"),
    (["run", "--interactive", "--prompts", "a"], "prompts: a chat does not use it"),
    (["chat", "--prompts", "a"], "prompts: a chat does not use it"),
    (["chat", "--output", "a"], "output: a chat does not use it"),
    (["chat", "--json"], "json: a chat does not use it"),
    (["chat", "--n", "2"], "n: a chat does not use it"),
    (["chat", "--logprobs", "2"], "logprobs: a chat does not use it"),
    (["chat", "--prompt-logprobs", "2"], "prompt_logprobs: a chat does not use it"),
    (["chat", "--priority", "2"], "priority: all requests"),
    (["chat", "--no-interactive"], "interactive: a chat is always interactive"),
    (["bench", "--host", "--model", "a"], "model_path has no effect"),
    (["bench", "--host", "--dtype", "f32"], "dtype has no effect"),
    (["bench", "--host", "--backend", "torch"], "backend: torch is not used with host"),
    (["bench", "--prefix-cache"], "prefix_cache: benchmarks run without it"),
    (["bench", "--scale", "0.5"], "--workloads"),
    (["bench", "--workloads", "single", "--batches", "2"], "--contexts or --profile"),
    (["graph", "--fused", ""], "backend '' is not registered"),
]


@pytest.mark.parametrize(("args", "words"), UNUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_flags_without_effect_are_refused_by_name(call, args, words):
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert words in err
    assert "hint: " in err


def test_config_keys_without_effect_in_a_chat_are_noted(call, folder, tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("prompts: [a]\nn: 2\nlogprobs: 1\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    status, out, err = call("chat", "c.yaml", "--w", folder, "--trace", "t.json", *QUICK)
    assert status == 0
    assert "note: prompts, n, logprobs: a chat does not use it" in err
    assert out
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_hints_where_the_context_is_full(call, folder, monkeypatch):
    def hints(*args):
        return [line for line in call(*args)[2].splitlines() if line.startswith("hint: ")]

    long = "word " * 300
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\n{long}\n"))
    whole = ["--w", folder, *QUICK]
    assert hints("chat", *whole) == ["hint: /clear starts a new conversation"]
    assert hints("run", "--prompts", long, *whole) == ["hint: shorten the prompt"]
    assert hints("run", "--prompts", long, *whole, "--max-model-len", "100") == [
        "hint: shorten the prompt, or raise max_model_len, to 512 at most"
    ]


def test_a_chat_with_a_model_without_a_template(call, folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    texts.change(model / "tokenizer_config.json", chat_template=None)
    status, _, err = call("chat", "--w", model)
    assert status == 2
    assert "hint: use `llmrs run` for plain text" in err
