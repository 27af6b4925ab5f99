"""`llmrs quantize` and `llmrs imatrix`: names, files, refusals, and what remains of a file that was not completed."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmrs.cli import main
from llmrs.models.files.gguf import GGUFSource

TEXT = "Hello! How are you? What is seven plus five? " * 12


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        status = main([str(a) for a in args])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run


def files():
    return sorted(p.name for p in Path().iterdir())


def types(path):
    return collections.Counter(t.type.name for t in GGUFSource(Path(path)).tensors.values())


def test_as_in_the_readme(command):
    status, out, err = command("quantize", "--quant", "q4k")
    assert status == 0
    assert files() == ["demo-q4k.gguf"]
    assert "29 of 29" in err
    assert "bf16 -> q4_k, error " in err
    assert "bits per weight" in out
    assert f"{Path('demo-q4k.gguf').stat().st_size / 1e6:.2f} MB" in out
    assert types("demo-q4k.gguf") == {"q4_k": 24, "q8_0": 4, "bf16": 1, "f32": 17}


def test_the_config_file_names_model_and_type(command, copied):
    Path("config.yaml").write_text(f"model: {copied}\nquant: q8-0\nsave_quantized: x\n")
    Path("t.txt").write_text(TEXT)
    assert command("quantize", "--eval", "t.txt")[0] == 0
    assert files() == ["config.yaml", "copied", "copied-q8_0.gguf", "t.txt"]
    assert command("quantize", "demo", "--isq", "Q4_0", "-o", "x.gguf")[0] == 0
    assert types("x.gguf")["q4_0"] == 24


def test_a_gguf_file_of_more_bits(command):
    assert command("quantize", "--quant", "bf16")[0] == 0
    assert command("quantize", "demo-bf16.gguf", "--quant", "q8_0")[0] == 0
    assert command("quantize", "demo-q8_0.gguf", "--quant", "q4_0", "-o", "less.gguf")[0] == 0
    assert types("less.gguf")["q4_0"] == 24
    for again in ("q8_0", "bf16"):
        status, _, err = command("quantize", "demo-q8_0.gguf", "--quant", again, "-o", "x.gguf")
        assert status == 2
        assert "layers.0.q is quantized already, in q8_0" in err
    assert files() == ["demo-bf16.gguf", "demo-q8_0.gguf", "less.gguf"]


REFUSED = {
    "no type": ([], "quant: no type is given", "--quant q4k"),
    "unknown": (["--quant", "q4kk"], "unknown quantization 'q4kk'", "did you mean q4k"),
    "no model": (["nothing", "--quant", "q4k"], "there is no model 'nothing'", "demo"),
    "no folder": (["--quant", "q4k", "-o", "a/b.gguf"], "there is no folder a", "create it"),
    "a folder": (["--quant", "q4k", "-o", "b"], "b is no name for q4k", "add .gguf"),
    "a file": (["--quant", "mlx4", "-o", "b.gguf"], "b.gguf is no name for mlx4", "leave out .gguf"),
    "no imatrix": (["--quant", "q4k", "--imatrix", "x.dat"], "there is no file x.dat", ""),
    "no use": (["--quant", "mlx4", "--imatrix", "x.dat"], "mlx4 does not use one", "q4k"),
    "no text": (["--quant", "q4k", "--eval", "x.txt"], "there is no file x.txt", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, command):
    arguments, problem, hint = REFUSED[case]
    status, out, err = command("quantize", *arguments)
    assert (status, out) == (2, "")
    assert problem in err
    assert hint in err
    assert not files()


def test_a_file_stays_without_force(command):
    Path("demo-q8_0.gguf").write_text("mine")
    status, _, err = command("quantize", "--quant", "q8_0")
    assert status == 2
    assert "demo-q8_0.gguf exists" in err
    assert Path("demo-q8_0.gguf").read_text() == "mine"
    assert command("quantize", "--quant", "q8_0", "--force")[0] == 0
    assert types("demo-q8_0.gguf")["q8_0"] == 28


def test_the_model_is_not_overwritten(command, copied):
    assert command("quantize", "--quant", "f16", "-o", "x.gguf")[0] == 0
    before = Path("x.gguf").read_bytes()
    status, _, err = command("quantize", "x.gguf", "--quant", "q8_0", "-o", "x.gguf", "--force")
    assert status == 2
    assert "is a file of the model" in err
    assert Path("x.gguf").read_bytes() == before
    status, _, err = command("quantize", copied, "--quant", "mlx4", "-o", copied, "--force")
    assert status == 2
    assert "holds the model" in err


def test_a_gguf_file_becomes_no_folder(command):
    assert command("quantize", "--quant", "f16", "-o", "x.gguf")[0] == 0
    status, _, err = command("quantize", "x.gguf", "--quant", "mlx4")
    assert status == 2
    assert "has no config.json" in err
    assert files() == ["x.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("quant", ["q8_0", "mlx8"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted(name, quant, command, monkeypatch):
    number = getattr(signal, name)
    monkeypatch.setattr("llmrs.cli.quantize.print_matrix", lambda matrix: os.kill(os.getpid(), number))
    assert command("quantize", "--quant", quant)[0] == 128 + number
    assert not files()


@pytest.mark.parametrize("quant", ["q8_0", "mlx8"])
def test_a_disk_that_fills_up(quant, tmp_path):
    """The kernel refuses to write on."""
    resource = pytest.importorskip("resource", reason="limits of a file's size are POSIX's")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    done = subprocess.run([sys.executable, "-m", "llmrs", "quantize", "--quant", quant], cwd=tmp_path, preexec_fn=limit,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "can't be written: File too large" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant", ["q8_0", "mlx8"])
def test_free_space_is_checked_first(quant, command, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    status, _, err = command("quantize", "--quant", quant)
    assert status == 2
    assert "bytes on the disk, and 1,048,576 are free" in err
    assert "of 29" not in err
    assert not files()


def test_rows_without_whole_blocks(command, checkpoints):
    import texts

    model = texts.write_model(checkpoints.folder("chat"), Path("model"))  # rows of 64 and 96
    status, _, err = command("quantize", model, "--quant", "q4k")
    assert status == 0
    assert "note: q4k: layers.0.q" in err
    assert "q8_0, as 64 columns are no whole blocks of q4_k" in err
    assert set(types("model-q4k.gguf")) == {"q8_0", "f32"}


def test_evaluation(command):
    Path("text.txt").write_text(TEXT)
    Path("answers.jsonl").write_text(json.dumps({"prompt": "What is 7 + 5?", "text": "7 + 5 = 12."}) + "\n")
    status, out, _ = command("quantize", "--quant", "q8_0", "--eval", "text.txt")
    assert status == 0
    assert 0 < float(out.split("KL divergence: ")[1].split()[0]) < 0.01
    status, out, _ = command("quantize", "--quant", "f32", "--eval", "answers.jsonl")
    assert status == 0
    assert "KL divergence: 0.00000 nats per token" in out
    assert "same likeliest token: 100.00 %" in out
    assert 1 <= float(out.split("perplexity: ")[1].split(",")[0]) < 1.1


BAD_TEXTS = {
    "empty": ("t.txt", "", "no text to evaluate"),
    "no JSON": ("t.jsonl", "{\n", "line 1: it is not JSON"),
    "no text": ("t.jsonl", '{"prompt": "a"}\n', "line 1: it has no prompt and text"),
    "numbers": ("t.jsonl", '{"prompt": "a", "text": 1}\n', "line 1: it has no prompt and text"),
    "nothing": ("t.jsonl", "\n", "no text to evaluate"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts(case, command):
    name, content, problem = BAD_TEXTS[case]
    Path(name).write_text(content)
    status, _, err = command("quantize", "--quant", "q8_0", "--eval", name)
    assert status == 2
    assert problem in err
    assert files() == [name]


def test_imatrix(command):
    Path("text.txt").write_text(TEXT * 3)
    status, out, _ = command("imatrix", "--text", "text.txt")
    assert status == 0
    assert "28 tensors" in out
    assert files() == ["demo-imatrix.gguf", "text.txt"]
    status, _, err = command("imatrix", "demo", "--text", "text.txt")
    assert status == 2
    assert "exists" in err
    assert command("quantize", "--quant", "q4k", "--imatrix", "demo-imatrix.gguf")[0] == 0
    assert command("quantize", "--quant", "q4k", "-o", "plain.gguf")[0] == 0
    assert Path("plain.gguf").read_bytes() != Path("demo-q4k.gguf").read_bytes()


def test_imatrix_of_too_little_text(command):
    assert "text: no text is given" in command("imatrix")[2]
    Path("text.txt").write_text("Hello")
    status, _, err = command("imatrix", "--text", "text.txt")
    assert status == 2
    assert "tokens" in err
    assert files() == ["text.txt"]


def test_permissions(command):
    command("quantize", "--quant", "q8_0")
    assert os.stat("demo-q8_0.gguf").st_mode & 0o777 == 0o666 & ~(os.umask(umask := os.umask(0)) or umask)
