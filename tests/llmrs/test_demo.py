"""The bundled model: what it must be, that it answers well, and that the text it was trained on is sound."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from demo_model import arithmetic, corpus

from llmrs import Engine, EngineConfig, Message, SamplingParams
from llmrs.models import demo
from llmrs.models.arch.families import read_config

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(temperature=0.0, max_tokens=96)


@pytest.fixture(scope="module")
def engine():
    with Engine(EngineConfig("demo", device="cpu")) as engine:
        yield engine


def answers(engine, *questions):
    prompts = [engine.apply_chat_template([Message("user", q)]) for q in questions]
    return engine.generate_sync(GREEDY, prompts)


def test_its_shape():
    c = read_config(demo.FILES)
    assert c.architecture == "Qwen3ForCausalLM"
    assert (demo.FILES / "model.safetensors").stat().st_size <= 8_000_000
    assert c.hidden_size % 256 == c.intermediate_size % 256 == 0
    assert c.head_dim == 64
    assert c.num_kv_heads >= 2
    header = (demo.FILES / "model.safetensors").read_bytes()[:20_000]
    assert b'"BF16"' in header
    assert b'"F32"' not in header


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What is llmrs?", "inference engine"),
        ("what is a kv cache", "keys and values"),
        ("What is 7 + 5?", "12"),
        ("what is 9 times 8", "72"),
        ("How are you?", "I am well"),
        ("Who are you?", "demo model"),
        ("What is the capital of France?", "Paris"),
        ("Which day comes after Friday?", "Saturday comes after Friday."),
        ("Who was Napoleon?", "I don't know"),
    ],
)
def test_it_answers_in_whole_sentences(engine, question, words):
    (output,) = answers(engine, question)
    assert words in output.text
    assert output.text.endswith((".", "?", "!"))
    assert output.finish_reason == "stop"


def test_sums_that_it_was_never_trained_on(engine):
    rng = Random(1)
    pairs = [(rng.randint(0, 100), rng.randint(0, 100)) for _ in range(2000)]
    pairs = [(a, b) for a, b in pairs if arithmetic.held_out("+", a, b)][:40]
    outputs = answers(engine, *(f"What is {a} + {b}?" for a, b in pairs))
    assert len(pairs) == 40
    assert sum(f" = {a + b}." in o.text for (a, b), o in zip(pairs, outputs, strict=True)) >= 38


def test_it_remembers_what_was_said(engine):
    talk = [Message("user", "My name is Julia.")]
    for question in ("What is 6 times 7?", "What is my name?"):
        said = engine.generate_sync(GREEDY, [engine.apply_chat_template(talk)])[0].text
        talk += [Message("assistant", said), Message("user", question)]
    final = engine.generate_sync(GREEDY, [engine.apply_chat_template(talk)])[0]
    assert "Julia" in final.text
    assert final.cached_tokens > 0  # the conversation so far was not computed again


def test_a_longer_conversation_begins_with_the_shorter_ones_tokens(engine):
    talk = [Message("user", "Hi")]
    first = engine.apply_chat_template(talk)
    (answer,) = engine.generate_sync(GREEDY, [first])
    second = engine.apply_chat_template([*talk, Message("assistant", answer.text), Message("user", "What is 7 + 5?")])
    before = (*first.token_ids, *answer.token_ids)
    assert second.token_ids[: len(before)] == before


def test_plain_text_is_completed(engine):
    (output,) = engine.generate_sync(GREEDY, ["The capital of Italy is"])
    assert output.text.startswith(" Rome.")


def test_the_report_has_40_samples_and_how_they_were_made():
    report = (demo.FILES / "REPORT.md").read_text("utf-8")
    record = json.loads((demo.FILES / "training.json").read_text("utf-8"))
    assert record["command"] in report
    assert re.search(r"Perplexity.*\d\.\d", report)
    samples = report.partition("## Samples")[2].partition("## Plain text")[0]
    assert sum(line.startswith("| ") for line in samples.splitlines()) == 40 + 2


def test_no_template_is_left_in_the_text():
    for text in corpus.documents("test", 3000):
        plain = re.sub(r"<\|\w+\|>", "", text)
        assert not re.search(r"[{}|]", plain), text


def test_held_out_sums_are_not_in_the_text():
    sums = re.compile(r"^(\d+) ([+-]) (\d+) = ", re.M)
    found = [m for text in corpus.documents("test", 3000) for m in sums.findall(text)]
    assert len(found) > 300
    assert not [(a, op, b) for a, op, b in found if arithmetic.held_out(op, int(a), int(b))]


def test_the_text_of_a_seed_is_always_the_same():
    assert list(corpus.documents("x", 20)) == list(corpus.documents("x", 20))
    assert list(corpus.documents("x", 20)) != list(corpus.documents("y", 20))


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["-m", "llmrs", "run", "examples/demo.yaml"], "", "7 + 5 = 12."),
        (["examples/completion.py", "demo", "The demo model is"], "", "The demo model is|"),
        (["examples/chat.py"], "Hello!\nWhat is 7 + 5?\n", "\n"),
    ],
)
def test_the_examples_run(args, stdin, words):
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert "Traceback" not in done.stderr
