"""Standard streams that are closed, broken or full, disks that are full, and signals: the command line as processes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmrs.cli import main, streams

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="descriptors and signals differ on Windows")

LLMRS = [sys.executable, "-m", "llmrs"]
TEN = ["--backend", "reference", "--dtype", "f32", "--max-tokens", "10", "--ignore-eos"]
FULL = pytest.param("/dev/full", marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full"))


@pytest.fixture
def asked(folder):
    """A command line that answers one prompt."""
    return [*LLMRS, "run", "--w", folder, "--prompts", "Hello", *TEN, "--temperature", "0"]


def shell(command, redirected="", **more):
    """Runs a command with redirections of sh; it must not show a traceback."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirected}', "sh", *command], capture_output=True, text=True, timeout=120, **more
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


def shells(*calls):
    """`shell(*call)` of each, at the same time."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda call: shell(*call), calls))


@pytest.fixture(scope="module")
def expected(folder):
    done = shell([*LLMRS, "run", "--w", folder, "--prompts", "Hello", *TEN, "--temperature", "0"])
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("where", [FULL])
def test_a_failing_stderr_changes_nothing(asked, expected, where):
    closed, full, wrong = shells((asked, "2>&-"), (asked, f"2> {where}"), ([*LLMRS, "run", "--nonsense"], "2>&-"))
    assert (closed.returncode, closed.stdout) == (0, expected)
    assert (full.returncode, full.stdout) == (0, expected)
    assert wrong.returncode == 2


def test_a_stderr_whose_reader_has_gone(asked, expected):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(asked, stdout=subprocess.PIPE, stderr=writer, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, expected)


def test_a_closed_stdout_loses_answers_unless_a_file_gets_them(asked, tmp_path):
    out = tmp_path / "out.jsonl"
    done, saved = shells(([*asked, "--json"], ">&-"), ([*asked, "--output", str(out)], ">&- 2>&-"))
    assert done.returncode == 2
    assert "error: standard output can't be written" in done.stderr
    assert "tokens/s" not in done.stderr  # found before the model was loaded
    assert saved.returncode == 0
    assert json.loads(out.read_text("utf-8"))["decoded_length"] == 10


FORKED = """
import os, sys
from llmrs.cli import main
for line in sys.argv[1:]:
    if not os.fork():
        sys.exit(main(line.split()))
    print(os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("where", [FULL])
def test_a_full_disk_fails_every_command(where):
    lines = ["--help", "run --help", "--version", "list", "graph"]  # in forks of one process, which has the modules
    done = shell([sys.executable, "-c", FORKED, *lines], f"> {where}")
    error = r"error: standard output can't be written: .*\nhint: the disk is full.*\n2\n"
    assert re.fullmatch(f"({error}){{{len(lines)}}}", done.stderr), done.stderr


FULL_DISK = {
    "> {}": "standard output can't be written: No space left on device; 0 of 1 answers were printed",
    "--json > {}": "standard output can't be written: No space left on device; 0 of 1 answers were printed",
    "--output {}": "output: /dev/full can't be written: No space left on device; it has 0 of 1 answers",
    "--trace {}": "trace: /dev/full can't be written: No space left on device",
}


@pytest.mark.parametrize("where", [FULL])
def test_answers_that_do_not_fit_on_the_disk(asked, expected, where):
    results = shells(*((asked, how.format(where)) for how in FULL_DISK))
    for (how, words), done in zip(FULL_DISK.items(), results, strict=True):
        assert done.returncode == 2, how
        assert f"error: {words}\nhint: " in done.stderr
        assert done.stdout == ("" if ">" in how else expected)


def test_a_disk_that_is_full_half_way_holds_whole_lines(asked, tmp_path):
    import resource

    def limit():  # of the size of files, at which writing fails in the same way
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    out = tmp_path / "out.jsonl"
    asked[asked.index("Hello")] = " | ".join(["Hello"] * 40)
    done = shell([*asked, "--output", str(out)], preexec_fn=limit)
    records = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert done.returncode == 2
    assert 0 < len(records) < 40
    assert f"it has {len(records)} of 40 answers" in done.stderr
    assert done.stdout.count("> Hello\n") == 40


def test_a_failing_stdout_still_fills_the_output_file(asked, tmp_path):
    out = tmp_path / "out.jsonl"
    many = [*asked, "--json", "--output", str(out), "--max-num-seqs", "1"]
    many[many.index("Hello")] = " | ".join(["Hello"] * 40)
    many[many.index("10")] = "50"
    with subprocess.Popen(many, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert "error" not in err
    records = [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]
    assert len(records) == 40
    assert records[0]["finish_reason"] == "length"
    assert records[-1]["finish_reason"] == "cancelled"


def test_a_pipe_that_does_not_block_is_waited_for(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read = []
    monkeypatch.setattr(streams.select, "select", lambda *_: read.append(os.read(reader, 2**20)))
    with io.FileIO(writer, "w") as raw:
        text = io.BufferedWriter(streams.DroppingRaw(raw, streams.raise_write_error, missing=False))
        text.write(b"x" * 2**20)
        text.flush()
    with io.FileIO(reader) as rest:
        assert b"".join([*read, rest.readall()]) == b"x" * 2**20
    assert len(read) > 1


@pytest.mark.parametrize("command", ["chat", "run --prompts -"])
def test_a_closed_stdin_is_an_empty_one(folder, command):
    whole = [*LLMRS, *command.split(), "--w", folder, *TEN]
    closed, empty = shells((whole, "<&-"), (whole, "< /dev/null"))
    assert (closed.returncode, closed.stdout, closed.stderr) == (empty.returncode, empty.stdout, empty.stderr)
    assert closed.returncode == (0 if command == "chat" else 2)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_text(folder, asked, expected, tmp_path, encoding):
    piped = [*asked]
    piped[piped.index("Hello")] = "-"
    (tmp_path / "prompt").write_bytes("Hello\n".encode(encoding))
    (tmp_path / "command").write_bytes("/help\n".encode(encoding))
    chat = [*LLMRS, "chat", "--w", folder, *TEN]
    done, talked = shells((piped, f"< {tmp_path}/prompt"), (chat, f"< {tmp_path}/command"))
    assert done.stdout == expected
    assert "/clear" in talked.stderr


def test_answers_are_utf_8_whatever_the_locale(asked):
    asked[asked.index("Hello")] = "¿Qué? 你"
    done = subprocess.run(
        [*asked, "--json"],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    assert json.loads(done.stdout.decode("utf-8"))["prompt"] == "¿Qué? 你"


def test_signals_keep_the_answers(asked, tmp_path):
    asked[asked.index("10")] = "400"
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}

    def stopped_by(number):
        out, trace = tmp_path / f"{number}.jsonl", tmp_path / f"{number}.json"
        command = [*asked, "--output", str(out), "--trace", str(trace)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
            process.stdout.read(1)
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        assert b"Traceback" not in err
        record = json.loads(out.read_text("utf-8"))
        assert record["finish_reason"] == "cancelled"
        assert record["text"]
        assert json.loads(trace.read_text("utf-8"))["traceEvents"]
        return process.returncode

    with ThreadPoolExecutor() as pool:
        statuses = list(pool.map(stopped_by, [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]))
    assert statuses == [143, 129, 130]


def test_sigterm_ends_a_chat_that_waits_for_input(folder):
    command = [*LLMRS, "chat", "--w", folder, *TEN]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(b"/help\n")
        process.stdin.flush()
        process.stderr.readline()  # the model is loaded
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 143


def test_sigterm_while_a_command_line_is_read(monkeypatch):
    def kill(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("llmrs.cli.flags.parse_flags", kill)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["run"]) == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_at_once(tmp_path):
    code = """
import os, signal
from llmrs.cli.signals import on_interrupt, termination

def twice():
    with on_interrupt(lambda: print("stopping", flush=True)) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        print(stopped.status, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("never")

from llmrs.cli.terminal import exit_status
with termination() as stopped:
    status = exit_status(twice)
raise SystemExit(stopped.status or status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("stopping\n143\n", "", 143)


def test_lines_are_edited_and_pasted_lines_are_one(tmp_path):
    pytest.importorskip("readline")
    code = """
import sys
from llmrs.cli.terminal import enable_line_editing
enable_line_editing()
found = [input("> ") for _ in range(3)]
open("found", "w").write(repr(found))
"""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "INPUTRC": "/dev/null"},
    ) as process:
        os.close(theirs)
        for keys in (b"bc\x1b[D\x1b[Da\r", b"\x1b[200~x\ny\tz\x1b[201~\r", b"\x1b[A\x1b[A\r"):
            shown = b""
            while b"> " not in shown:
                shown += os.read(ours, 1000)
            os.write(ours, keys)
        while process.poll() is None:
            try:
                os.read(ours, 1000)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert (tmp_path / "found").read_text() == repr(["abc", "x\ny\tz", "abc"])


def test_after_a_failure_the_rest_is_dropped():
    class Broken(io.RawIOBase):
        writes = 0

        def writable(self):
            return True

        def write(self, data):
            self.writes += 1
            raise OSError(5, "Input/output error")

    broken = Broken()
    raw = streams.DroppingRaw(broken, streams.raise_write_error, missing=False)
    text = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")
    with pytest.raises(streams.WriteError, match="Input/output error"):
        print("a", file=text, flush=True)
    print("b", file=text, flush=True)
    assert broken.writes == 1
