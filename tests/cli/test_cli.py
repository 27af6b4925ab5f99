"""The command line as people and scripts use it: what goes where, exit statuses, flags, interruption."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import texts

from llmrs.cli import main

QUICK = ["--dtype", "f32", "--max-tokens", "6", "--temperature", "0"]


def test_one_prompt_streams_to_stdout_and_figures_go_to_stderr(call, folder):
    status, out, err = call("run", "--model", folder, "--prompts", "Hello", *QUICK)
    assert status == 0
    assert out.endswith("\n")
    assert re.search(r"^Prompt tokens: \d+ in [\d.]+ s \([\d.]+ tokens/s\)$", err, re.M)
    assert re.search(r"^Decoded tokens: 6 in [\d.]+ s \([\d.]+ tokens/s\)$", err, re.M)
    assert "\x1b" not in out + err
    assert "loading" not in err  # progress is for terminals


def test_several_prompts_are_answered_in_their_order(call, folder):
    status, out, _ = call("run", "--model", folder, "--prompts", "Hello | the", *QUICK)
    assert status == 0
    assert out.index("> Hello\n") < out.index("> the\n")


def test_json_and_output_hold_the_same_records(call, folder, tmp_path):
    status, out, _ = call("run", "--w", folder, "--prompts", "Hello|the", "--json", "--output", "r.jsonl", *QUICK)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert (tmp_path / "r.jsonl").read_text("utf-8") == out
    assert [r["prompt"] for r in records] == ["Hello", "the"]
    assert all(r["decoded_length"] == len(r["token_ids"]) == 6 and r["error"] is None for r in records)
    _, out, _ = call("run", "--w", folder, "--prompts", "Hello", *QUICK)
    assert out == records[0]["text"] + "\n"


def test_a_config_file_and_flags_over_it(call, folder, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"model: {json.dumps(str(folder))}\nprompts: [Hello]\nmax_tokens: 3\ndtype: f32\nseed: 1\n"
    )
    assert json.loads(call("run", "c.yaml", "--json")[1])["decoded_length"] == 3
    assert json.loads(call("run", "c.yaml", "--json", "--max_tokens", "5")[1])["decoded_length"] == 5
    (tmp_path / "c.yaml").rename(tmp_path / "config.yaml")
    assert json.loads(call("run", "--json")[1])["decoded_length"] == 3


def test_plain_text_and_chat(call, folder):
    chat = json.loads(call("run", "--w", folder, "--prompts", "Hello", "--json", *QUICK)[1])
    system = json.loads(call("run", "--w", folder, "--prompts", "Hello", "--json", "--system", "Be kind.", *QUICK)[1])
    plain = json.loads(call("run", "--w", folder, "--prompts", "Hello", "--json", "--no-chat", *QUICK)[1])
    assert plain["prompt_length"] < chat["prompt_length"] < system["prompt_length"]


def test_in_a_batch_only_the_bad_request_fails(call, folder, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps("word " * 600) + "\n" + json.dumps("Hello") + '\n"\\ud800"\n')
    status, out, err = call("run", "--w", folder, "--prompts", "p.jsonl", "--json", *QUICK)
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 2
    assert [r["error"] and r["error"]["type"] for r in records] == ["ContextLengthError", None, "RequestError"]
    assert records[1]["decoded_length"] == 6
    assert "error: prompt 1: the prompt has" in err
    assert "error: prompt 3: " in err
    assert "Traceback" not in err


def test_vllm_rs_spellings(call, folder):
    args = [
        "--w",
        folder,
        "--d",
        "cpu",
        "--max-num-seqs",
        "2",
        "--max-model-len",
        "128",
        "--max-tokens",
        "3",
    ]
    status, out, _ = call("run", *args, "--prompts", "Hello | the", "--json", "--kv-cache-dtype", "f32", "--flash")
    assert status == 0
    assert len(out.splitlines()) == 2


def test_a_conversation(call, folder, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/stats\n/clear\n/nonsense\n/help\nthe\n/exit\nnever\n"))
    status, out, err = call("chat", "--w", folder, *QUICK)
    assert status == 0
    assert len(out.splitlines()) >= 2
    for words in ("Prompt tokens", "Conversation:", "unknown command /nonsense", "/clear"):
        assert words in err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert call("run", "--i", "--w", folder, *QUICK)[0] == 0


def test_special_tokens_in_the_output_stay_out_of_the_history(call, folder, monkeypatch):
    import io

    lengths = []
    for shown in ("--skip-special-tokens", "--no-skip-special-tokens"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nHello\n/stats\n"))
        _, out, err = call("chat", "--w", folder, *QUICK, "--allowed-token-ids", "1", shown)
        assert ("<|im_start|>" in out) == (shown == "--no-skip-special-tokens")
        lengths.append(next(line.split()[2] for line in err.splitlines() if "Prompt tokens" in line))
    assert lengths[0] == lengths[1]


def test_a_graph_on_one_screen(call, folder):
    status, out, err = call("graph", folder)
    assert (status, err) == (0, "")
    assert "attend" in out
    assert "layer[0..2]" in out
    assert len(out.splitlines()) < 45
    _, fused, _ = call("graph", folder, "--fused", "all")
    assert "merged_linear" in fused
    assert "qk_norm_rope_write_kv" in fused
    assert len(fused.splitlines()) < len(out.splitlines())


def spoil(folder, tmp_path, **config):
    model = tmp_path / "spoiled"
    texts.shutil.copytree(folder, model)
    texts.change(model / "config.json", **config)
    return model


WRONG = [
    (["run", "none.yaml"], "none.yaml"),
    (["run", "--prompts", "a", "--model", "nowhere"], "nowhere"),
    (["run", "--prompts", "a", "--model", "someone/model"], "Hugging Face"),
    (["run", "--prompts", "a", "--model", "x.gguf"], "there is no file x.gguf"),
    (["run", "x.gguf"], "x.gguf is a GGUF file"),
    (["run", "--prompts", "a", "--model", "a/b/x.gguf", "--offline"], "a/b is not in the Hugging Face cache"),
    (["run", "--prompts", "a", "--model", "a/b:Q4_K_M", "--offline"], "a/b is not in the Hugging Face cache"),
    (["run", "--prompts", "a", "--model", "MODEL:Q4_K_M"], "holds no GGUF file of a model"),
    (["run", "--w", "MODEL"], "no prompts"),
    (["run", "--w", "MODEL", "--prompts", "a", "--max-tokens", "0"], "max_tokens: 0"),
    (["run", "--w", "MODEL", "--prompts", "a", "--max-tokens", "-1"], "max_tokens: -1"),
    (["run", "--w", "MODEL", "--prompts", "a", "--max-tokens", "many"], "'many'"),
    (["run", "--w", "MODEL", "--prompts", "a", "--temperature", "nan"], "temperature: nan"),
    (["run", "--w", "MODEL", "--prompts", "a", "--seed", str(2**64)], "seed: 18446744073709551616"),
    (["run", "--w", "MODEL", "--prompts", "a", "--backend", "tpu"], "'tpu'"),
    (["run", "--w", "MODEL", "--prompts", "a", "--backend", "torhc"], "did you mean torch"),
    (["run", "--w", "MODEL", "--prompts", "a", "--device", "cuda:7"], "cuda:7"),
    (["run", "--w", "MODEL", "--prompts", "a", "--isq", "q4kk"], "quant: unknown quantization 'q4kk'"),
    (["run", "--w", "MODEL", "--prompts", "a", "--isq", "q4kk"], "did you mean q4k"),
    (["run", "--w", "MODEL", "--prompts", "a", "--save-quantized", "x.gguf"], "add quant: q4k"),
    (["run", "--w", "MODEL", "--prompts", "a", "--quant", "q4k", "--save-quantized", "x"], "ends in .gguf"),
    (["run", "--w", "MODEL", "--prompts", "a", "--kv-cache-memory", "100", "--max-model-len", "100"], "KV cache"),
    (["run", "--w", "MODEL", "--prompts", "a", "--max-model-len", "100000"], "context of 512"),
    (["run", "--w", "MODEL", "--prompts", "word " * 600], "max_model_len 512 leaves no room"),
    (["run", "--w", "MODEL", "--prompts", "a", "--output", "/nowhere/x"], "/nowhere/x"),
    (["run", "--w", "MODEL", "--prompts", "a", "--model-path", "b"], "two flags set"),
    (["run", "--max-token", "3"], "did you mean --max-tokens"),
    (["run", "a.yaml", "b.yaml"], "unexpected extra argument"),
    (["run", "--prompts"], "--prompts"),
    (["run", "--batch", "8"], "batch is not implemented"),
    (["chat", "--no-chat"], "chat: false"),
    (["chatt"], "'chatt'\nhint: did you mean 'chat'?"),
    (["serve"], "'serve'\nhint: see `llmrs --help`"),
    (["graph", "nowhere"], "nowhere"),
    (["graph", "a/b", "--offline"], "a/b is not in the Hugging Face cache"),
    (["run", "--prompts", "a", "--model", "demo", "--revision", "main"], "revision: demo"),
    (["graph", "MODEL", "--fused", "nothing"], "nothing"),
]


@pytest.mark.parametrize(("args", "words"), WRONG, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_wrong_usage_gives_an_error_a_hint_and_status_2(call, folder, args, words):
    status, out, err = call(*[a.replace("MODEL", str(folder)) for a in args])
    assert (status, out) == (2, "")
    other = ("Prompt", "Decoded", "note", "weights ", "KV cache ", "free ", "max length ", "concurrency ", "advice ")
    lines = [line for line in err.splitlines() if not line.startswith(other)]
    assert lines[0].startswith("error: ")
    assert words in err
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2


def test_broken_model_folders_are_refused_the_same_way(call, folder, tmp_path):
    model = spoil(folder, tmp_path, architectures=None)
    status, out, err = call("run", "--w", model, "--prompts", "a")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 2


def test_control_characters_of_a_file_do_not_reach_the_terminal(call, folder, tmp_path):
    model = spoil(folder, tmp_path, architectures=["\x1b[31mFoo\nerror: no"])
    _, _, err = call("run", "--w", model, "--prompts", "a")
    assert "\x1b" not in err
    assert err.count("\n") == 2


# as processes


def start(*args, **more):
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "llmrs", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **more,
    )


def test_help_is_quick_and_complete():
    code = "import sys; from llmrs.cli import main; status = main(['run', '--help']); assert 'torch' not in sys.modules"
    env = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for flag in ("--model", "--max-num-seqs", "--temperature", "--prompts", "--backend"):
        assert flag in done.stdout


def test_the_version(call):
    import llmrs

    assert call("--version") == (0, f"llmrs {llmrs.__version__}\n", "")


SMALL = ["--backend", "reference", "--dtype", "f32", "--max-num-batched-tokens", "32", "--max-num-seqs", "4"]
LONG = [*SMALL, "--ignore-eos", "--max-tokens"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ on Windows")
@pytest.mark.parametrize("count", [1, 40])
def test_ctrl_c_keeps_the_answers(folder, tmp_path, count):
    out = tmp_path / "out.jsonl"
    args = ["--w", folder, "--output", str(out), "--prompts", " | ".join(["Hello"] * count)]
    with start("run", *args, *LONG, "400" if count == 1 else "100") as process:
        process.stdout.read(1)  # something was said
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Decoded tokens" in err
    records = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]  # text may hold other line ends
    assert len(records) == count
    assert {r["finish_reason"] for r in records} <= {"cancelled", "length"}
    assert records[0]["text"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
def test_a_live_line_for_many_prompts_on_a_terminal(folder):
    ours, theirs = os.openpty()
    prompts = " | ".join(["Hello"] * 20)
    command = [sys.executable, "-m", "llmrs.cli", "run", "--w", folder, "--prompts", prompts, *LONG, "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        out = process.stdout.read()
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert re.search(r"\r\d+ of 20 answered, \d+ tokens, [\d.]+ tokens/s", shown)
    assert out.count("> Hello\n") == 20
    assert "answered" not in out


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes on Windows")
def test_a_stdout_pipe_that_is_closed(folder):
    with start("run", "--w", folder, "--prompts", "Hello", *LONG, "400") as process:
        process.stdout.read(1)
        process.stdout.close()
        process.wait(timeout=60)
        assert "Traceback" not in process.stderr.read()
        assert process.returncode in (0, 1)


def test_bench_of_the_host(monkeypatch, capsys):
    monkeypatch.setattr("llmrs.cli.bench.HOST_BATCHES", (1, 3))
    assert main(["bench", "--host", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["host_seconds_per_step"]
    assert set(found) == {"1", "3"}
    assert all(seconds > 0 for seconds in found.values())
    assert main(["bench", "--host"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_bench_of_a_model(call, folder):
    options = ["--model", folder, "--dtype", "f32", "--batches", "2", "--new-tokens", "4", "--prompt-tokens", "8"]
    status, out, _ = call("bench", *options)
    assert status == 0
    assert "GB/s read" in out
    assert re.search(r"^decode, batch 2 +6 ", out, re.M)
    status, out, _ = call("bench", *options, "--json")
    found = json.loads(out)
    assert found["bytes_per_second"] > 0
    assert [r["tokens"] for r in found["results"]] == [6, 511]
    assert all(r["fraction_of_roofline"] > 0 for r in found["results"])
    status, out, err = call("bench", "--model", folder, "--new-tokens", "1000000")
    assert (status, out) == (2, "")
    assert "more than the context" in err
