"""Options: one definition, from which YAML keys, flags, help and docs come; and every way to get one wrong."""

from enum import Enum, IntEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrs.cli import table
from llmrs.cli.flags import hidden, visible
from llmrs.cli.options import SECTIONS, RunOptions
from llmrs.cli.settings import load_settings
from llmrs.core.config import BUILT_IN, EngineConfig, SamplingParams, build, options
from llmrs.core.errors import ConfigError

DOCS = Path(__file__).parent.parent / "docs"


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
    assert table.renewed(page) == page, "run: python -m llmrs.cli.table docs/config.md"


def test_no_two_options_share_a_name_or_flag():
    flags = [f for cls in SECTIONS.values() for o in options(cls) for f in dict.fromkeys(visible(o) + hidden(o))]
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
        ("batch: 3", "batch is not there yet"),
        ("port: 80", "port is not there yet"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("dtype: f32\ndtype: f32", "comes twice"),
        ("- a", "no mapping"),
        ("just text", "no mapping"),
        ("", "empty"),
        ("a: [", "not YAML"),
        ("a: 2020-99-99", "not YAML"),
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
