"""Options: one definition, from which YAML keys, flags, help and docs come; and every way to get one wrong."""

import os
import re
import threading
from enum import Enum, IntEnum
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmrs.cli import docs_table
from llmrs.cli.flags import hidden_flags, visible_flags
from llmrs.cli.options import SECTIONS, RunOptions
from llmrs.cli.settings import load_settings
from llmrs.cli.yaml_file import read_yaml
from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.core.options import BUILT_IN, SamplingParams, build, options

DOCS = Path(__file__).parents[2] / "docs"


def from_yaml(tmp_path, text, **flags):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_settings(str(path), flags)


def refused(tmp_path, text, *words, **flags):
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, text, **flags)
    shown = f"{caught.value.message} {caught.value.hint}"
    for word in words:
        assert word in shown
    assert caught.value.hint


def test_the_docs_tables_are_those_of_the_options():
    page = (DOCS / "config.md").read_text("utf-8")
    assert docs_table.updated(page) == page, "run: python -m llmrs.cli.docs_table docs/config.md"


def test_no_two_options_share_a_name_or_flag():
    both = [[*visible_flags(o), *hidden_flags(o)] for cls in SECTIONS.values() for o in options(cls)]
    flags = [f for flags in both for f in dict.fromkeys(flags)]
    assert len(flags) == len(set(flags))


def test_the_file_of_the_docs(tmp_path):
    page = (DOCS / "config.md").read_text("utf-8")
    settings = from_yaml(tmp_path, page.split("```yaml\n")[1].split("```")[0])
    assert settings.run.prompts == ["How are you?", "What is 7 + 5?"]
    assert settings.engine == EngineConfig("demo", max_model_len=4096, max_num_seqs=32, max_num_batched_tokens=2048)
    assert settings.sampling == SamplingParams(temperature=0.6, max_tokens=256)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    settings = from_yaml(tmp_path, "temperature: 0.5\nmax_tokens: 9\nmodel: here", temperature=0.7)
    assert (settings.sampling.temperature, settings.sampling.max_tokens) == (0.7, 9)
    assert settings.engine.model_path == "here"
    assert settings.engine.dtype == "bf16"


def test_without_a_file_config_yaml_is_read_if_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings(None, {}).engine == EngineConfig()
    Path("config.yaml").write_text("dtype: f32")
    assert load_settings(None, {}).engine.dtype == "f32"


def test_aliases(tmp_path):
    assert from_yaml(tmp_path, "w: somewhere\nisq: null").engine.model_path == "somewhere"
    refused(tmp_path, "w: a\nmodel: b", "set already")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompts: a | b|  | c ", ["a", "b", "c"]),
        ('prompts: ["a | b", c]', ["a | b", "c"]),
        ("prompts: one.txt", ["first", "second line"]),
        ("prompts: two.jsonl", ["x", "y\nz"]),
    ],
)
def test_prompts(tmp_path, text, expected):
    (tmp_path / "one.txt").write_text("\ufefffirst\n\n  second line\n", "utf-8")
    (tmp_path / "two.jsonl").write_text('"x"\n{"prompt": "y\\nz", "id": 3}\n')
    assert from_yaml(tmp_path, text).run.prompts == expected


def test_prompts_from_a_pipe(monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb\n"))
    assert load_settings(None, {"prompts": ["-"]}).run.prompts == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompts: |", "no text"),
        ('prompts: " | "', "no text"),
        ("prompts: nowhere.txt", "no file"),
        ("prompts: bad.jsonl", "line 2"),
        ("prompts: binary.txt", "UTF-8"),
        ("prompts: empty.txt", "no prompts"),
        ("prompts: 3", "a list"),
        ("prompts: [a, 3]", "3 is not allowed"),
        ("prompts: ['']", "none empty"),
        ("max_tokens: 0", "from 1"),
        ("max_tokens: -3", "-3"),
        ("max_tokens: 1.5", "1.5"),
        ("max_tokens: '7'", "'7'"),
        ("max_tokens: true", "True"),
        ("temperature: .nan", "nan"),
        ("temperature: .inf", "inf"),
        ("temperature: -0.1", "-0.1"),
        ("temperature: warm", "'warm'"),
        ("seed: 18446744073709551616", "18446744073709551616"),
        ("seed: -1", "-1"),
        ("top_p: 1.5", "1.5"),
        ("min_p: 2", "2"),
        ("top_k: -1", "-1"),
        ("dtype: fp8", "bf16, f16, f32"),
        ("max_num_seqs: 0", "from 1"),
        ("max_model_len: 1", "from 2"),
        ("stop: {a: 1}", "a list"),
        ("stop: ['']", "none empty"),
        ("stop_token_ids: [a]", "'a'"),
        ("model: [a]", "text"),
        ("model: null", "None"),
        ("modle: demo", "did you mean model"),
        ("max-tokens: 3", "did you mean max_tokens"),
        ("3: x", "unknown option 3"),
        ("batch: 3", "batch is not implemented"),
        ("port: 80", "port is not implemented"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("dtype: f32\ndtype: f32", "duplicate key"),
        ("- a", "no mapping"),
        ("just text", "no mapping"),
        ("", "empty"),
        ("a: [", "not YAML"),
        ("a: !!timestamp 2020-99-99", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"a: \x00", "not YAML"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("chat: false\nsystem: Hi", "chat template"),
        ("x: " + "a" * 5_000_000, "larger"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, words):
    (tmp_path / "bad.jsonl").write_text('"x"\n3\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xff")
    (tmp_path / "empty.txt").write_text("\n")
    refused(tmp_path, text, words)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("temperature: 1e-3", "temperature", 0.001),
        ("temperature: .5", "temperature", 0.5),
        ("temperature: 0.2_5", "temperature", 0.25),
        ("max_tokens: 1_000", "max_tokens", 1000),
        ("max_tokens: 0o17", "max_tokens", 15),
        ("max_tokens: 0x1F", "max_tokens", 31),
        ("max_tokens: 0b11", "max_tokens", 3),
        ("max_tokens: +3", "max_tokens", 3),
        ("max_tokens:", "max_tokens", None),
        ("ignore_eos: yes", "ignore_eos", True),
        ("prefix_cache: Off", "prefix_cache", False),
        ("i: on", "interactive", True),
        ("stop: [yes, no, 12:30, 2020-01-01, =, 0o9, 007]", "stop", "yes no 12:30 2020-01-01 = 0o9 007".split()),
        ("system: on", "system", "on"),
        ("prompts: 12:30", "prompts", ["12:30"]),
        ("system: |\n  a\tb", "system", "a\tb"),
        ("logit_bias: {0x10: 1e0}", "logit_bias", {16: 1.0}),
    ],
)
def test_words_and_numbers_mean_what_they_mean_in_yaml_1_2(tmp_path, text, name, value):
    settings = from_yaml(tmp_path, text)
    found = {**vars(settings.engine), **vars(settings.sampling), **vars(settings.run)}
    assert found[name] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dtype: f32\nmax_tokens: 017", "line 2: max_tokens: '017' is not allowed"),
        ("dtype: f32\n\nmax_tokens: 12:30", "line 3: max_tokens: '12:30' is not allowed"),
        ("max_tokens: 1,000", "line 1: max_tokens: '1,000' is not allowed"),
        ("max_tokens: 1e3", "line 1: max_tokens: 1000.0 is not allowed"),
        ("ignore_eos: 'yes'", "line 1: ignore_eos: 'yes' is not allowed"),
        ("ignore_eos: 1", "line 1: ignore_eos: 1 is not allowed"),
        ("dtype: f32\nstop: [a, 3]", 'line 2: stop: 3 is not allowed; it must be .* put quotes around it: "3"'),
        ("system: true", 'line 1: system: True is not allowed.*put quotes around it: "true"'),
        ("dtype: f32\n\tmax_tokens: 3", "a tab in line 2 .*spaces"),
        ("prompts:\n\t- a", "a tab in line 2 .*spaces"),
        ("dtype:\tf32", "a tab in line 1 .*spaces"),
        ("dtype: f32\nmodle: demo", "line 2: unknown option 'modle'"),
        ("dtype: f32\n? [a]\n: 1", "line 2"),
        ("ignore_eos: !!bool maybe", "not YAML"),
        ("1: a\n0x1: b", "duplicate key 1 in line 2"),
    ],
)
def test_ambiguous_values_are_refused_with_their_line(tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(str(tmp_path / "config.yaml"), {})
    assert re.search(words, str(caught.value))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("yesno :-,'\"\n\t#[]{}&*~=<|é"),
    st.lists,
)


@given(VALUES)
def test_pyyaml_round_trip(value):
    with NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump({"key": value}, file, allow_unicode=True)
        file.flush()
        assert read_yaml(Path(file.name)) == {"key": (value, 1)}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.jsonl", b'"a"\n{"prompt": ""}\n', "p.jsonl, line 2: the prompt is empty"),
        ("p.jsonl", b'"a"\n\n{"text": "b"}\n[]\n', r'p.jsonl, line 3: the object has no "prompt" \(and .* 2 lines'),
        ("p.jsonl", b'"a"\n{"prompt": "b"\n', "p.jsonl, line 2: it is not JSON"),
        ("p.jsonl", b'{"prompt": null}', "p.jsonl, line 1: the prompt is not text"),
        ("p.txt", b"a\nb\xff\n", "p.txt, line 2, is not UTF-8"),
        ("p.txt", "a\n".encode("utf-16-le"), "p.txt holds zero bytes"),
        ("p", b"", "holds no prompts"),
    ],
)
def test_a_wrong_line_of_a_file_of_prompts_is_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        load_settings(None, {"prompts": [str(tmp_path / name)]})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_prompts_as_editors_write_them(tmp_path, encoding):
    (tmp_path / "p.txt").write_bytes("é\r\n\r\n b\u2028c \rd".encode(encoding))
    assert load_settings(None, {"prompts": [str(tmp_path / "p.txt")]}).run.prompts == ["é", "b\u2028c", "d"]


def test_a_folder_is_no_file_of_prompts(tmp_path, monkeypatch):
    (tmp_path / "word").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="word is a folder"):
        load_settings(None, {"prompts": ["word"]})
    assert load_settings(None, {"prompts": ["word |"]}).run.prompts == ["word"]


def test_a_file_of_prompts_without_end_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("llmrs.cli.prompts.MAX_BYTES", 100)
    (tmp_path / "p.txt").write_text("a\n" * 51)
    with pytest.raises(ConfigError, match="larger than 100 bytes"):
        load_settings(None, {"prompts": [str(tmp_path / "p.txt")]})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes on Windows")
def test_prompts_from_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a\nb\n",))
    writer.start()
    assert load_settings(None, {"prompts": [str(tmp_path / "pipe")]}).run.prompts == ["a", "b"]
    writer.join()


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=path.name):
            load_settings(str(path), {})


@given(value=st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.booleans(), st.lists(st.integers())))
@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, RunOptions])
def test_any_value_is_taken_as_it_is_or_refused_by_name(cls, value):
    for o in options(cls):
        try:
            (made,) = build({o.name: value}, cls)
        except ConfigError as error:
            assert o.name in error.message  # noqa: PT017
        else:
            listed = o.kind is list and not isinstance(value, list)
            assert getattr(made, o.name) == ([value] if listed else value)


@pytest.mark.parametrize(
    ("cls", "name", "given", "expected"),
    [
        (EngineConfig, "model_path", Path("models") / "mine", str(Path("models") / "mine")),
        (EngineConfig, "max_num_seqs", np.int16(3), 3),
        (EngineConfig, "memory_limit", np.uint64(2**40), 2**40),
        (EngineConfig, "memory_fraction", np.float32(0.5), 0.5),
        (EngineConfig, "memory_fraction", np.int8(1), 1.0),
        (EngineConfig, "offline", np.True_, True),
        (EngineConfig, "prefix_cache", np.bool_(0), False),
        (EngineConfig, "dtype", np.str_("f32"), "f32"),
        (EngineConfig, "dtype", Enum("Dtypes", {"F16": "f16"}, type=str).F16, "f16"),
        (SamplingParams, "temperature", np.float64(0.5), 0.5),
        (SamplingParams, "temperature", np.longdouble(0.5), 0.5),
        (SamplingParams, "temperature", np.array(0.5), 0.5),
        (SamplingParams, "seed", np.uint64(2**64 - 1), 2**64 - 1),
        (SamplingParams, "priority", IntEnum("Priority", {"LOW": 5}).LOW, 5),
        (SamplingParams, "stop", "x", ["x"]),
        (SamplingParams, "stop", ("x", np.str_("y")), ["x", "y"]),
        (SamplingParams, "stop", [], []),
        (SamplingParams, "stop_token_ids", 5, [5]),
        (SamplingParams, "stop_token_ids", np.uint8(5), [5]),
        (SamplingParams, "stop_token_ids", {5}, [5]),
        (SamplingParams, "allowed_token_ids", np.array([5, 6], np.uint16), [5, 6]),
        (SamplingParams, "allowed_token_ids", range(5, 7), [5, 6]),
        (SamplingParams, "logit_bias", {np.int64(3): np.float16(1.5), 4: 1}, {3: 1.5, 4: 1.0}),
    ],
)
def test_values_of_other_types_that_mean_the_same(cls, name, given, expected):
    (made,) = build({name: given}, cls)
    value = getattr(made, name)
    assert value == expected
    assert repr(value) == repr(expected)  # Python's own types, all through


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("max_tokens", np.True_),
        ("max_tokens", np.float64(1)),
        ("max_tokens", np.array([1])),
        ("max_tokens", np.int64(0)),
        ("ignore_eos", np.int64(1)),
        ("temperature", np.float32("nan")),
        ("temperature", np.complex64(1)),
        ("temperature", np.datetime64("2020-01-01")),
        ("stop", Path("x")),
        ("stop", b"x"),
        ("stop", {"x": 1}),
        ("stop", [["x"]]),
        ("stop", np.array([b"x"])),
        ("stop_token_ids", np.zeros((2, 2), int)),
        ("stop_token_ids", np.array([True])),
        ("logit_bias", {np.True_: 1.0}),
        ("logit_bias", {3: "1"}),
        ("logit_bias", [(3, 1.0)]),
    ],
)
def test_values_of_other_types_that_mean_nothing(name, given):
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: given})


def test_lists_are_copied():
    """They are checked once: what the caller does with its own list later must not come past that."""
    stops, bias = [1], {1: 1.0}
    params = SamplingParams(stop_token_ids=stops, logit_bias=bias)
    stops.append(-1)
    bias[-1] = 1e9
    assert (params.stop_token_ids, params.logit_bias) == ([1], {1: 1.0})


def test_sampling_values_come_from_the_first_that_has_one():
    request, yaml = SamplingParams(top_k=3), SamplingParams(top_k=5, temperature=0.5)
    merged = request.over(yaml, BUILT_IN)
    assert (merged.top_k, merged.temperature, merged.top_p, merged.seed) == (3, 0.5, 1.0, None)
