"""Hugging Face ids against a fake Hub: requests, cache contents, errors."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hub_server
import numpy as np
import pytest
import texts
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from llmrs import Engine, EngineConfig, LoadCancelledError, Message, ModelError, SamplingParams
from llmrs.cli import main
from llmrs.models.hub import download, errors
from llmrs.models.hub.resolve import resolve_model
from llmrs.models.hub.snapshot import MAX_SHARDS

NAME = "some-org/tiny_chat.v1"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    folder = texts.write_model(checkpoints.folder("chat"), tmp_path_factory.mktemp("whole") / "model")
    for name in ("README.md", "pytorch_model.bin", "modeling_evil.py", "tokenizer.model"):
        (folder / name).write_text("not needed")
    return folder


def shard(folder, target, rename=lambda name: name):
    """A copy of a model with its tensors in two files and an index."""
    texts.shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    parts = {f"model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, names in parts.items():
        save_file({n: tensors[n] for n in names}, target / file)
    table = {n: rename(file) for file, names in parts.items() for n in names}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return target


def test_an_id_is_downloaded_and_answers_as_its_folder_does(hub, folder):
    repository, seen = hub.add(NAME, folder), []
    answers = []
    for model in (NAME, str(folder)):
        with Engine(EngineConfig(model, dtype="f32"), on_download=lambda *n: seen.append(n)) as engine:
            prompt = engine.apply_chat_template([Message("user", "Hello")])
            answers.append(engine.generate_sync(SamplingParams(temperature=0.0, max_tokens=8), [prompt])[0].token_ids)
    assert answers[0] == answers[1]
    assert Counter(hub.names()) == Counter(NEEDED)  # each once, and nothing else
    total = sum(len(repository.files[n]) for n in NEEDED)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    kept = resolve_model(NAME)
    assert kept.name == repository.commit
    assert Counter(hub.names()) == Counter(NEEDED)  # the second time only the list is asked for
    assert all((kept / n).read_bytes() == repository.files[n] for n in NEEDED)


def test_templates_are_downloaded_and_read(hub, folder):
    """Those that are used, in the folder that transformers gives them; links in it lead to the blobs."""
    files = {
        "chat_template.jinja": b"D",
        "additional_chat_templates/tool_use.jinja": b"T{{ tools | length }}{{ bos_token }}",
        "special_tokens_map.json": b'{"bos_token": "<|im_start|>"}',
    }
    repository = hub.add(NAME, folder)
    repository.files |= {**files, "additional_chat_templates/rag.jinja": b"R"}
    for offline in (False, True):
        with Engine(EngineConfig(NAME, dtype="f32", offline=offline)) as engine:
            assert engine.apply_chat_template([Message("user", "Hi")]) == "D"
            assert engine.apply_chat_template([Message("user", "Hi")], tools=[{}]) == "T1<|im_start|>"
    assert Counter(hub.names()) == Counter({*NEEDED, *files})


def test_the_librarys_own_functions_find_what_was_downloaded(hub, folder):
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    repository = hub.add(NAME, folder)
    resolve_model(NAME)
    found = try_to_load_from_cache(NAME, "model.safetensors")
    assert Path(found).read_bytes() == repository.files["model.safetensors"]
    (scanned,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    assert scanned.repo_id == NAME
    assert not scan_cache_dir(constants.HF_HUB_CACHE).warnings


def test_a_graph_needs_only_the_config(hub, folder, capsys):
    hub.add(NAME, folder)
    assert main(["graph", NAME]) == 0
    assert "attend" in capsys.readouterr().out
    assert hub.names() == ["config.json"]
    hub.add("o/unknown", folder).files["config.json"] = b'{"architectures": ["Strange"]}'
    with pytest.raises(ModelError, match="Strange"):
        resolve_model("o/unknown")
    assert hub.names() == ["config.json"] * 2  # no weights of a model that can't run


def test_shards_are_those_that_the_index_names(hub, folder, tmp_path):
    sharded = shard(folder, tmp_path / "sharded")
    (sharded / "model-00009-of-00009.safetensors").write_bytes(b"left over")
    hub.add(NAME, sharded)
    found = resolve_model(NAME)
    asked = Counter(n for n in hub.names() if "safetensors" in n)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert asked == Counter(names)
    with Engine(EngineConfig(str(found), dtype="f32")) as engine:
        assert engine.generate_sync(SamplingParams(max_tokens=2), ["Hello"])[0].decoded_length


HOSTILE = [
    "../../evil.safetensors",
    "/etc/passwd",
    "pytorch_model.bin",
    "a/b.safetensors",
    "..safetensors",
    "x\0.safetensors",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_that_names_other_files(hub, folder, tmp_path, name):
    hub.add(NAME, shard(folder, tmp_path / "sharded", lambda file: name if "00002-of" in file else file))
    with pytest.raises(ModelError, match="is no safetensors file of the repository"):
        resolve_model(NAME)
    assert not [n for n in hub.names() if n.endswith(("safetensors", "passwd", "bin"))]


@pytest.mark.parametrize("table", [{}, [], {"a": 1}, {str(n): f"{n}.safetensors" for n in range(MAX_SHARDS + 1)}])
def test_an_index_that_is_none(hub, folder, tmp_path, table):
    repository = hub.add(NAME, shard(folder, tmp_path / "sharded"))
    repository.files["model.safetensors.index.json"] = json.dumps({"weight_map": table}).encode()
    with pytest.raises(ModelError, match=r"weight_map|names \d+ files"):
        resolve_model(NAME)


def test_an_index_that_names_a_file_that_is_not_there(hub, folder, tmp_path):
    repository = hub.add(NAME, shard(folder, tmp_path / "sharded"))
    del repository.files["model-00002-of-00002.safetensors"]
    with pytest.raises(ModelError, match="lacks model-00002"):
        resolve_model(NAME)


def weights_asked(hub):
    return [(a.range, a.served) for a in hub.asked if a.path.endswith("/model.safetensors")]


def test_a_connection_that_breaks_is_taken_up_again(hub, folder):
    data = hub.add(NAME, folder).files["model.safetensors"]
    hub.cut["model.safetensors"] = [1000, 500]
    found = resolve_model(NAME)
    assert weights_asked(hub) == [(None, 1000), ("bytes=1000-", 500), ("bytes=1500-", len(data) - 1500)]
    assert (found / "model.safetensors").read_bytes() == data


def test_an_interrupted_download_goes_on_the_next_time(hub, folder):
    data = hub.add(NAME, folder).files["model.safetensors"]
    hub.cut["model.safetensors"] = [1000] + [0] * (download.RETRIES + 1)
    with pytest.raises(ModelError, match=r"model\.safetensors broke off") as caught:
        resolve_model(NAME)
    assert "try again" in caught.value.hint
    hub.asked.clear()
    found = resolve_model(NAME)
    assert weights_asked(hub) == [("bytes=1000-", len(data) - 1000)]
    assert hub.names() == ["model.safetensors"]  # the rest is there
    assert (found / "model.safetensors").read_bytes() == data


def test_a_download_that_is_cancelled_keeps_what_it_has(hub, folder):
    data = hub.add(NAME, folder).files["model.safetensors"]
    with pytest.raises(LoadCancelledError):
        Engine(EngineConfig(NAME), on_download=lambda done, total: total - done > 200_000)
    assert weights_asked(hub)
    hub.asked.clear()
    resolve_model(NAME)
    ((start, served),) = weights_asked(hub)
    assert start == f"bytes={len(data) - served}-"
    assert 0 < served <= 250_000


def test_a_server_that_knows_no_ranges_sends_all_again(hub, folder):
    data = hub.add(NAME, folder).files["model.safetensors"]
    hub.cut["model.safetensors"], hub.ranges = [1000], False
    assert (resolve_model(NAME) / "model.safetensors").read_bytes() == data


def longer(data):
    return data + b"x"


def other(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("change", [longer, other, lambda data: data[:500]], ids=["longer", "other", "shorter"])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_is_not_what_was_promised(hub, folder, change, file):
    data = hub.add(NAME, folder).files[file]
    hub.replaced[file] = change(data)
    with pytest.raises(ModelError, match=r"after its download"):
        resolve_model(NAME)
    hub.replaced.clear()
    assert (resolve_model(NAME) / file).read_bytes() == data  # nothing of the wrong one was kept


def test_a_partial_file_that_is_longer_than_the_server_has_it(hub, folder):
    data = hub.add(NAME, folder).files["model.safetensors"]
    hub.cut["model.safetensors"] = [1000] + [0] * (download.RETRIES + 1)
    with pytest.raises(ModelError):
        resolve_model(NAME)
    hub.replaced["model.safetensors"] = data[:400]
    with pytest.raises(ModelError, match="after its download"):
        resolve_model(NAME)


def test_a_revision_is_pinned(hub, folder, tmp_path):
    old = hub.add(NAME, folder, commit="b" * 40, revisions=("v1",))
    assert resolve_model(NAME, "v1").name == "b" * 40
    assert all(f"/resolve/{'b' * 40}/" in a.path for a in hub.asked[1:])
    assert resolve_model(NAME, "b" * 40).name == "b" * 40
    with pytest.raises(ModelError, match="no revision 'v2'"):
        resolve_model(NAME, "v2")
    hub.repositories[NAME] = hub_server.Repository(
        {**old.files, "chat_template.jinja": b"{{ 1 }}"}, "c" * 40, ("v1", "main")
    )
    assert resolve_model(NAME).name == "c" * 40
    assert (resolve_model(NAME, "v1") / "chat_template.jinja").read_text() == "{{ 1 }}"  # the branch moved
    assert resolve_model(NAME, "b" * 40, offline=True).name == "b" * 40


@pytest.mark.parametrize("revision", ["../../main", "a..b", "", "a b", "-x", "/etc", "a\0", "a//b", "x" * 300])
def test_a_revision_is_checked_before_it_becomes_a_path(hub, folder, revision):
    hub.add(NAME, folder)
    with pytest.raises(ModelError, match="revision"):
        resolve_model(NAME, revision)
    assert not hub.asked


def test_offline_uses_only_the_cache(hub, folder, monkeypatch):
    hub.add(NAME, folder)
    with pytest.raises(ModelError, match="not in the Hugging Face cache") as caught:
        resolve_model(NAME, offline=True)
    assert "download it once" in caught.value.hint
    resolve_model(NAME, weights=False)
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json"):
        resolve_model(NAME, offline=True)
    assert resolve_model(NAME, offline=True, weights=False).is_dir()
    there = resolve_model(NAME)
    hub.asked.clear()
    assert resolve_model(NAME, offline=True) == there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME) == there
    with pytest.raises(ModelError, match="at v7 is not in"):
        resolve_model(NAME, "v7")
    assert not hub.asked


def test_offline_with_shards(hub, folder, tmp_path):
    hub.add(NAME, shard(folder, tmp_path / "sharded"))
    there = resolve_model(NAME)
    assert resolve_model(NAME, offline=True) == there
    (there / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks model-00002"):
        resolve_model(NAME, offline=True)


def test_the_token_goes_to_the_endpoint_only(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add(NAME, folder)
    with hub_server.serving() as elsewhere:
        elsewhere.add(NAME, folder)
        hub.elsewhere = elsewhere.url
        resolve_model(NAME)
        assert {a.token for a in hub.asked} == {"Bearer hf_secret"}
        assert {a.token for a in elsewhere.asked} == {None}
        assert set(elsewhere.names()) == NEEDED


REFUSED = [
    (404, "RepoNotFound", "no model", "HF_TOKEN"),
    (401, "RepoNotFound", "no model", "HF_TOKEN"),
    (401, "GatedRepo", "gated", "accept its terms"),
    (403, "GatedRepo", "gated", "accept its terms"),
    (401, "", "refuses access", "token"),
    (403, "", "refuses access", "token"),
    (429, "", "fewer requests", "wait"),
    (500, "", "HTTP status 500", "try again"),
]


@pytest.mark.parametrize(("status", "code", "message", "hint"), REFUSED)
def test_what_the_hub_refuses(hub, status, code, message, hint):
    hub.status[NAME] = status, code
    with pytest.raises(ModelError, match=message) as caught:
        resolve_model(NAME)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "info", [b"<html>", b"[]", b"{}", b'{"id": "x", "sha": "../..", "siblings": []}', b'{"id": 1, "siblings": 3}']
)
def test_an_answer_that_is_no_list_of_files(hub, folder, info):
    hub.add(NAME, folder)
    hub.info = info
    with pytest.raises(ModelError, match=r"gave no list|names no commit"):
        resolve_model(NAME)


def test_hashes_and_sizes_that_are_none_are_not_believed(hub, folder):
    repository = hub.add(NAME, folder)
    described = hub_server.described(NAME, repository)
    for sibling in described["siblings"]:
        sibling["blobId"] = "../../../evil"
        sibling.pop("lfs", None)
    hub.info = json.dumps(described).encode()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        resolve_model(NAME)


def test_a_repository_without_safetensors(hub, folder):
    del hub.add(NAME, folder).files["model.safetensors"]
    with pytest.raises(ModelError, match=r"no model\.safetensors, only pytorch_model\.bin"):
        resolve_model(NAME)
    assert "pytorch_model.bin" not in hub.names()


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"quantization_config": {"quant_method": "hqq"}}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "INT2"}}),
    ],
)
def test_quantization_that_is_refused_downloads_no_weights(hub, folder, file, settings):
    files = hub.add(NAME, folder).files
    files[file] = json.dumps({**json.loads(files.get(file, "{}")), **settings}).encode()
    with pytest.raises(ModelError, match=r"hqq|INT2") as caught:
        resolve_model(NAME)
    assert caught.value.hint
    assert set(hub.names()) == {"config.json", file}


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="can't be reached") as caught:
        resolve_model(NAME)
    assert "offline" in caught.value.hint


def test_a_full_disk(hub, folder, monkeypatch):
    hub.add(NAME, folder)
    usage = download.shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match="more bytes on the disk, and 5,000 are free"):
        resolve_model(NAME)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="disk is full") as caught, errors.explained(NAME, None, ""):
        raise OSError(28, "No space left on device")
    assert "HF_HOME" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["a/b c", "a--b/c", "a/..", "a/b.git", "ä/b", "a/" + "b" * 100, "a/b\n", "a/-b", "a\\x/b"]
)
def test_ids_are_checked_before_anything_is_asked(hub, name):
    with pytest.raises(ModelError, match="neither a folder nor a Hugging Face id"):
        resolve_model(name)
    assert not hub.asked


def test_a_folder_wins_over_an_id(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts.shutil.copytree(folder, tmp_path / NAME)
    assert resolve_model(NAME).resolve() == (tmp_path / NAME).resolve()
    with pytest.raises(ModelError, match="revision"):
        resolve_model(NAME, "main")
    with pytest.raises(ModelError, match="revision"):
        resolve_model("demo", "main")
    assert not hub.asked


def test_the_command_line_with_the_librarys_own_settings(hub, folder, tmp_path):
    """As a process, with what huggingface_hub reads from the environment when it is imported."""
    hub.add(NAME, folder)
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_TOKEN": "hf_x"}
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"  # else the library asks the Hub for a list of programs
    args = ["run", "--model", NAME, "--prompts", "Hello", "--max-tokens", "4", "--dtype", "f32"]

    def call(*more, offline):
        command = [sys.executable, "-m", "llmrs.cli", *args, *more]
        return subprocess.run(command, capture_output=True, text=True, env={**env, "HF_HUB_OFFLINE": offline})

    missing = call(offline="1")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: some-org/tiny_chat.v1 is not in the Hugging Face cache")
    assert not hub.asked
    for done in (call(offline="0"), call("--offline", offline="0"), call(offline="1")):
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[0].startswith("Prompt tokens")  # no bars, no warnings
    assert Counter(hub.names()) == Counter(NEEDED)
    assert {a.token for a in hub.asked} == {"Bearer hf_x"}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
def test_progress_of_the_download_on_a_terminal(hub, folder, tmp_path):
    hub.add(NAME, folder)
    hub.pause = 0.15  # the line is drawn ten times a second at most
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0"}
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "llmrs.cli", "run", "--model", NAME, "--prompts", "Hello", "--max-tokens", "2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env={**env, "COLUMNS": "100"})
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0, shown
    assert re.search(rf"\rdownloading {NAME}: \d+ % of 0\.5 MB", shown)
    assert "it/s" not in shown  # no bars of the library


def test_folders_do_not_import_the_library(folder):
    code = (
        "import sys\nfrom llmrs.models.hub.resolve import resolve_model\nfrom llmrs import Engine\n"
        f"resolve_model({str(folder)!r})\nresolve_model('demo')\nassert 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_blobs_that_repositories_share(tmp_path):
    from llmrs.models.files.untrusted import inside

    snapshot = tmp_path / "models--a--b" / "snapshots" / ("a" * 40)
    for path in (snapshot, tmp_path / "models--a--b" / "blobs", tmp_path / "blobs" / "ab"):
        path.mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / "abc").write_bytes(np.arange(3).tobytes())
    (tmp_path / "models--a--b" / "blobs" / "x").symlink_to("../../blobs/ab/abc")
    (snapshot / "file").symlink_to("../../blobs/x")
    assert inside(snapshot, "file") == snapshot / "file"
    (snapshot / "out").symlink_to("../../../../secret")
    with pytest.raises(ModelError, match="leads out"):
        inside(snapshot, "out")
