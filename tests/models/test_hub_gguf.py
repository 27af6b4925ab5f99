"""Names of GGUF models: files, folders, tags, repositories of a fake Hub; nothing but the chosen file is downloaded."""

import os
from collections import Counter

import gguf_files
import gguf_models
import pytest
from hub_server import Repository
from hypothesis import given
from hypothesis import strategies as st

from llmrs import Engine, EngineConfig, LoadCancelledError, ModelError, SamplingParams
from llmrs.models.hub import download, gguf_check
from llmrs.models.hub.gguf_names import OTHER_KINDS, choose, split_tag
from llmrs.models.hub.gguf_names import gguf_models as models_of
from llmrs.models.hub.resolve import resolve_model

NAME = "some-org/tiny.v1-GGUF"
PARTS = [f"tiny-Q4_0-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]


@pytest.fixture(scope="session")
def contents(folder, tmp_path_factory):
    """Bytes of one model in three types, and as a split set."""
    made = tmp_path_factory.mktemp("gguf")
    files = {f"tiny-{kind}.gguf": gguf_models.write(folder, made / kind, kind) for kind in ("F16", "BF16", "F32")}
    gguf_models.write(folder, made / "tiny-Q4_0.gguf", split_max_tensors=15)
    return {n: p.read_bytes() for n, p in files.items()} | {n: (made / n).read_bytes() for n in PARTS}


def put(hub, *names, contents, others=(), **more):
    """A repository of files by their content's name: `to=content`, or the content's name alone."""
    files = {n.partition("=")[0]: contents[n.rpartition("=")[2]] for n in names}
    hub.repositories[NAME] = Repository(files | dict.fromkeys(others, b"{}"), lfs=".gguf", **more)
    return hub.repositories[NAME]


def test_a_tag_downloads_one_file_and_answers_as_the_file_does(hub, contents, tmp_path):
    repository = put(hub, "tiny-F16.gguf", "tiny-F32.gguf", contents=contents, others=["README.md", "config.json"])
    (tmp_path / "x.gguf").write_bytes(contents["tiny-F16.gguf"])
    answers, seen = [], []
    for model in (f"{NAME}:f16", tmp_path / "x.gguf"):
        with Engine(EngineConfig(model, dtype="f32"), on_download=lambda *n: seen.append(n)) as engine:
            answers.append(engine.generate_sync(SamplingParams(temperature=0.0, max_tokens=8), ["Hello"])[0].token_ids)
    assert answers[0] == answers[1]
    assert Counter(hub.names()) == {"tiny-F16.gguf": 1}
    assert seen[-1] == (len(contents["tiny-F16.gguf"]),) * 2
    assert seen == sorted(seen)
    kept = resolve_model(f"{NAME}:F16")
    assert (kept.name, kept.parent.name) == ("tiny-F16.gguf", repository.commit)
    assert kept.read_bytes() == contents["tiny-F16.gguf"]
    hub.asked.clear()
    assert resolve_model(f"{NAME}:F16", offline=True) == kept
    assert not hub.asked


@pytest.mark.parametrize(
    ("files", "want", "expected"),
    [
        (["tiny-F16.gguf", "tiny-F32.gguf"], ":f32", "tiny-F32.gguf"),
        (["tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "tiny-IQ4_XS.gguf"], "", "tiny-Q4_K_M.gguf"),
        (["tiny-Q8_0.gguf", "tiny-Q6_K.gguf", "tiny-BF16.gguf"], "", "tiny-Q8_0.gguf"),
        (["tiny-Q6_K.gguf"], "", "tiny-Q6_K.gguf"),
        (["tiny.q4_k_m.gguf", "tiny.q8_0.gguf"], "", "tiny.q4_k_m.gguf"),
        (["tiny-Q4_K_M.gguf", "tiny-UD-Q4_K_M.gguf"], ":Q4_K_M", "tiny-Q4_K_M.gguf"),
        (["tiny-UD-Q4_K_XL.gguf", "tiny-Q4_K_M.gguf"], ":q4_k_xl", "tiny-UD-Q4_K_XL.gguf"),
        (["tiny-Q4_K_M-imat.gguf", "tiny-IQ4_K_M.gguf"], ":Q4_K_M", "tiny-Q4_K_M-imat.gguf"),
        (["mmproj-tiny-Q8_0.gguf", "tiny-Q8_0.gguf", "imatrix.gguf", "mtp-tiny-Q8_0.gguf"], "", "tiny-Q8_0.gguf"),
        (["Q8_0/tiny.gguf", "Q4_K_M/tiny.gguf"], ":q8_0", "Q8_0/tiny.gguf"),
        (["a/b/tiny-Q8_0.gguf", "a/tiny-Q8_0.gguf"], "/a/b/tiny-Q8_0.gguf", "a/b/tiny-Q8_0.gguf"),
        (["mmproj-F16.gguf", "tiny-Q8_0.gguf"], "/tiny-Q8_0.gguf", "tiny-Q8_0.gguf"),
    ],
)  # fmt: skip
def test_which_file_a_name_means(hub, contents, files, want, expected):
    put(hub, *(f"{n}=tiny-F16.gguf" for n in files), contents=contents)
    path = resolve_model(NAME + want)
    assert path.as_posix().endswith(f"/snapshots/{'a' * 40}/{expected}")
    assert set(hub.names()) == {expected}
    assert resolve_model(NAME + want, offline=True) == path


@pytest.mark.parametrize(
    ("files", "want", "words", "hint"),
    [
        (["tiny-Q6_K.gguf", "tiny-Q5_K_M.gguf"], "", ["2 GGUF models: Q5_K_M, Q6_K"], f"{NAME}:Q5_K_M"),
        (["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"], ":Q4_K_N", ["'Q4_K_N'", "Q4_K_M, Q8_0"], "did you mean Q4_K_M?"),
        (["tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"], ":iq1", ["'iq1'", "Q4_K_M, Q8_0"], "known are: Q4_K_M, Q8_0"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], ":Q8_0", ["2 GGUF models 'Q8_0': a-Q8_0.gguf, b-"], f"{NAME}/a-Q8_0.gguf"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "", ["2 GGUF models: a-Q8_0.gguf, b-Q8_0.gguf"], "choose one"),
        (["tiny-Q8_0.gguf"], "/tiny-Q8.gguf", ["no file 'tiny-Q8.gguf'"], "did you mean tiny-Q8_0.gguf?"),
        (["mmproj-F16.gguf"], ":F16", ["holds no GGUF file of a model"], "leave out the tag"),
        (["tiny-Q8_0-00001-of-00002.gguf"], "", ["lacks tiny-Q8_0-00002-of-00002.gguf"], "broken"),
    ],
)
def test_names_that_mean_no_file(hub, contents, files, want, words, hint):
    put(hub, *(f"{n}=tiny-F16.gguf" for n in files), contents=contents)
    with pytest.raises(ModelError) as caught:
        resolve_model(NAME + want)
    assert all(w in caught.value.message for w in [NAME, *words])
    assert hint in caught.value.hint
    assert not hub.names()


def test_safetensors_come_first_unless_a_tag_is_given(hub, contents, folder):
    repository = put(hub, "tiny-F16.gguf", contents=contents)
    repository.files |= {p.name: p.read_bytes() for p in folder.iterdir()}
    assert resolve_model(NAME).is_dir()
    assert "tiny-F16.gguf" not in hub.names()
    assert resolve_model(f"{NAME}:F16").name == "tiny-F16.gguf"
    assert resolve_model(NAME, offline=True).is_dir()
    assert resolve_model(f"{NAME}:F16", offline=True).name == "tiny-F16.gguf"
    with pytest.raises(ModelError, match=r"no GGUF model 'Q8_0': it has F16"):
        resolve_model(f"{NAME}:Q8_0")


def test_a_split_set_is_downloaded_whole(hub, contents):
    nested = [f"Q4_0/{n}={n}" for n in PARTS]
    put(hub, *nested, "tiny-F16.gguf", contents=contents)
    path = resolve_model(f"{NAME}:Q4_0")
    assert Counter(hub.names()) == Counter(f"Q4_0/{n}" for n in PARTS)
    assert resolve_model(f"{NAME}/Q4_0/{PARTS[1]}") == path  # any of the set
    with Engine(EngineConfig(str(path), dtype="f32")) as engine:
        assert engine.generate_sync(SamplingParams(max_tokens=2), ["Hello"])[0].decoded_length
    path.with_name(PARTS[2]).unlink()
    with pytest.raises(ModelError, match=r"lacks Q4_0/tiny-Q4_0-00003-of-00003.gguf in the Hugging Face cache"):
        resolve_model(f"{NAME}:Q4_0", offline=True)


HOSTILE = ["../../evil-Q8_0.gguf", "/etc/x-Q8_0.gguf", "a/../../x-Q8_0.gguf", "a/./x-Q8_0.gguf", "x\0-Q8_0.gguf",
           "c:x-Q8_0.gguf", "a\\..\\x-Q8_0.gguf", ".hidden-Q8_0.gguf", "a//x-Q8_0.gguf", "a/b/c/d/e/f/x-Q8_0.gguf",
           "con./x-Q8_0.gguf", "\x1b[31m-Q8_0.gguf", "x\n-Q8_0.gguf"]  # fmt: skip


@pytest.mark.parametrize("file", HOSTILE)
def test_names_in_a_listing_that_lead_elsewhere(hub, contents, file, tmp_path):
    put(hub, f"{file}=tiny-F16.gguf", contents=contents)
    with pytest.raises(ModelError, match="a name that is not allowed"):
        resolve_model(f"{NAME}:Q8_0")
    assert not hub.names()
    assert not list(tmp_path.rglob("*evil*"))


def test_what_can_not_run_is_refused_by_the_first_bytes(hub, contents, folder, tmp_path, monkeypatch):
    """Before the rest is downloaded; a header longer than that is read in several steps."""
    monkeypatch.setattr(gguf_check, "FIRST_BYTES", 1000)
    strange = gguf_models.write(folder, tmp_path / "a", change=lambda w: w.add_bool("qwen3.strange", True)).read_bytes()
    assert strange.index(b"token_embd") > 4000
    cases = {
        "qwen3.strange is True": strange,
        "'gpt9'": strange.replace(b"gpt2", b"gpt9").replace(b"qwen3.strange", b"other.strange"),
        "general.architecture is 'qwen9'": strange.replace(b"qwen3", b"qwen9"),
        "no GGUF file": b"GGML" + strange,
        "overlaps": gguf_files.build((), [gguf_files.place(n, (4,)) for n in "xy"], bytes(100_000)),
    }
    for word, data in cases.items():
        put(hub, "tiny-F16.gguf=bad", contents={"bad": data + bytes(2_000_000)})
        with pytest.raises(ModelError, match=word):
            resolve_model(NAME)
        assert word == "overlaps" or sum(a.served for a in hub.asked) < 100_000  # it could be cut off
        hub.asked.clear()


def test_the_beginning_is_a_part_of_the_download(hub, contents, monkeypatch):
    monkeypatch.setattr(gguf_check, "FIRST_BYTES", 1000)
    data = contents["tiny-F32.gguf"]
    for hub.ranges in (True, False):
        put(hub, "tiny-F32.gguf", contents=contents, commit="ab"[hub.ranges] * 40)
        path = resolve_model(NAME)
        assert path.read_bytes() == data
        if hub.ranges:
            asked = [(a.range, a.served) for a in hub.asked if a.range]
            assert asked[0] == ("bytes=0-999", 1000)
            assert len(asked) > 2
            assert asked[-1] == (f"bytes={len(data) - asked[-1][1]}-", asked[-1][1])
            assert sum(served for _, served in asked) == len(data)
            path.resolve().unlink()


def test_a_download_goes_on_where_a_failure_stopped_it(hub, contents):
    data = contents["tiny-F32.gguf"]
    put(hub, "tiny-F32.gguf", contents=contents)
    hub.cut["tiny-F32.gguf"] = [100_000, 5000] + [0] * (download.RETRIES + 1)
    with pytest.raises(ModelError, match=r"tiny-F32\.gguf broke off"):
        resolve_model(NAME)
    hub.asked.clear()
    assert resolve_model(NAME).read_bytes() == data
    ((start, served),) = [(a.range, a.served) for a in hub.asked if a.path.endswith(".gguf")]
    assert start == "bytes=105000-"
    assert served == len(data) - 105_000


def test_a_download_that_is_cancelled_keeps_what_it_has(hub, contents):
    put(hub, "tiny-F32.gguf", contents=contents)
    with pytest.raises(LoadCancelledError):
        Engine(EngineConfig(NAME), on_download=lambda done, total: done < 100_000)
    hub.asked.clear()
    assert resolve_model(NAME).read_bytes() == contents["tiny-F32.gguf"]
    assert hub.asked[-1].range


@pytest.mark.parametrize(
    "change", [lambda d: d + b"x", lambda d: d[:-1] + b"\1", lambda d: b"<html>", lambda d: d[:-9]]
)
def test_a_file_that_is_not_what_was_promised(hub, contents, change):
    put(hub, "tiny-F16.gguf", contents=contents)
    hub.replaced["tiny-F16.gguf"] = change(contents["tiny-F16.gguf"])
    with pytest.raises(ModelError, match=r"after its download|no GGUF file"):
        resolve_model(NAME)
    hub.replaced.clear()
    assert resolve_model(NAME).read_bytes() == contents["tiny-F16.gguf"]  # nothing of the wrong one was kept


def test_a_full_disk(hub, contents, monkeypatch):
    put(hub, "tiny-F16.gguf", contents=contents)
    usage = download.shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ModelError, match="more bytes on the disk, and 5,000 are free"):
        resolve_model(NAME)
    assert not hub.names()


def test_revisions_and_the_cache(hub, contents):
    put(hub, "tiny-F16.gguf", contents=contents, commit="b" * 40, revisions=("v1",))
    assert resolve_model(f"{NAME}:F16", "v1").parent.name == "b" * 40
    assert resolve_model(NAME, "v1", offline=True).name == "tiny-F16.gguf"
    with pytest.raises(ModelError, match="no GGUF model 'Q8_0'") as caught:
        resolve_model(f"{NAME}:Q8_0", "v1", offline=True)
    assert "in the Hugging Face cache" in caught.value.message
    with pytest.raises(ModelError, match="not in the Hugging Face cache"):
        resolve_model(f"{NAME}:F16", offline=True)


def test_a_graph_of_a_file_that_is_not_cached(hub, contents, call):
    put(hub, "tiny-F16.gguf", contents=contents)
    status, _, err = call("graph", f"{NAME}:F16")
    assert status == 2
    assert "tiny-F16.gguf is not in the Hugging Face cache" in err
    assert not hub.names()
    resolve_model(NAME)
    assert call("graph", f"{NAME}:F16")[0] == 0


def put_local(folder, contents, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(contents.get(name, b"{}"))
    return folder


def test_folders_of_files(tmp_path, contents):
    one = put_local(tmp_path / "one", contents, "tiny-F16.gguf", "mmproj-F16.gguf", "imatrix.gguf", "README.md")
    assert resolve_model(str(one)) == one / "tiny-F16.gguf"
    parts = put_local(tmp_path / "parts", contents, *PARTS)
    assert resolve_model(str(parts)) == parts / PARTS[0]
    assert resolve_model(str(parts / PARTS[2])) == parts / PARTS[2]
    several = put_local(tmp_path / "several", contents, "tiny-F16.gguf", "tiny-F32.gguf", *PARTS)
    for tag, file in (("F16", "tiny-F16.gguf"), ("q4_0", PARTS[0]), ("F32", "tiny-F32.gguf")):
        assert resolve_model(f"{several}:{tag}") == several / file
    with pytest.raises(ModelError) as caught:
        resolve_model(str(several))
    assert "3 GGUF models: F16, F32, Q4_0" in caught.value.message
    assert f"{several}:F16" in caught.value.hint
    assert str(several / "tiny-F16.gguf") in os.path.normpath(caught.value.hint)
    with pytest.raises(ModelError, match="no GGUF model 'Q8_0'"):
        resolve_model(f"{several}:Q8_0")
    with pytest.raises(ModelError, match=r"there is no file .*tiny-F61\.gguf") as caught:
        resolve_model(str(several / "tiny-F61.gguf"))
    assert "did you mean tiny-F16.gguf" in caught.value.hint
    nested = put_local(tmp_path / "nested", contents, f"Q4_0/{PARTS[0]}")
    assert resolve_model(f"{nested}:Q4_0") == nested / "Q4_0" / PARTS[0]


def test_folders_with_a_config(tmp_path, contents, copied):
    with_config = put_local(tmp_path / "a", contents, "config.json", "tiny-F16.gguf")
    assert resolve_model(str(with_config)) == with_config / "tiny-F16.gguf"
    (copied / "tiny-F16.gguf").write_bytes(contents["tiny-F16.gguf"])
    assert resolve_model(str(copied)) == copied
    assert resolve_model(f"{copied}:F16") == copied / "tiny-F16.gguf"


@given(st.text(st.sampled_from("abQ48_0KM-./:fF16"), max_size=30))
def test_names_of_any_form(name):
    base, tag = split_tag(name)
    assert name == (base if tag is None else f"{base}:{tag}")
    for model in models_of([name]):
        assert name in model.files
        assert model.tag in model.stem
        if model.tag:
            assert choose([model], "x", model.tag.swapcase()) == model


def test_names_that_are_no_models():
    assert not models_of([f"{word}x-Q8_0.gguf" for word in OTHER_KINDS])
    assert not models_of(["a.bin", "gguf", "a-00003-of-00002.gguf", "a.gguf.part"])
