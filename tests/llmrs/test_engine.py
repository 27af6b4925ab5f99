"""The engine: text in, text out, threads, streams, and closing."""

import array
import asyncio
import gc
import pickle
import queue
import threading
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import texts
import torch
from tiny import BACKENDS

from llmrs import (
    ChatPrompt,
    ConfigError,
    ContextLengthError,
    Engine,
    EngineClosedError,
    EngineConfig,
    GenerationOutput,
    LlmrsError,
    Message,
    ModelError,
    RequestError,
    SamplingParams,
)
from llmrs.inputs import InputProcessor
from llmrs.worker import Worker

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = ["Hello", "What is 7 + 5?", "the there", "a b c"]


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request, folder):
    backend, _, device = request.param.partition(":")
    with Engine(EngineConfig(str(folder), backend=backend, device=device or "cpu", dtype="f32")) as engine:
        yield engine


@pytest.fixture
def quick(folder):
    """A new engine for one test."""
    with Engine(EngineConfig(str(folder), dtype="f32", max_model_len=256)) as engine:
        yield engine


def threads():
    return [t for t in threading.enumerate() if t.name == "llmrs"]


def test_the_example_of_the_readme_as_written(folder, capsys):
    cfg = EngineConfig(model_path=str(folder), max_model_len=512)
    engine = Engine(cfg, "bf16")
    params = SamplingParams(temperature=0.6, max_tokens=256)
    prompt = engine.apply_chat_template([Message("user", "How are you?")], True)
    outputs = engine.generate_sync([params, params], [prompt, prompt])
    print(outputs)
    stream = engine.generate_stream(params, prompt)
    for token in stream:
        print(token)
    engine.close()
    assert all(isinstance(o, GenerationOutput) for o in outputs)
    assert capsys.readouterr().err == f"{prompt}\n"  # log=True


def test_outputs_say_everything(engine):
    (output,) = engine.generate_sync(GREEDY, ["Hello"])
    assert output.prompt_length == len(engine.model.tokenizer.encode("Hello"))
    assert output.decoded_length == len(output.token_ids) == 12
    assert output.finish_reason == "length"
    assert output.text == engine.model.tokenizer.inner.decode(output.token_ids)
    assert min(output.queue_time, output.prompt_time, output.decode_time) >= 0
    assert output.prompt_time > 0


def test_answers_equal_transformers(engine, checkpoints):
    model, tokenizer = checkpoints.model("chat"), engine.model.tokenizer
    for prompt, output in zip(PROMPTS, engine.generate_sync(GREEDY, PROMPTS), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt)])
        settings = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
        assert output.token_ids == expected


def test_streamed_equals_not_streamed_alone_and_together(engine):
    params = [SamplingParams(temperature=0.9, top_k=20, seed=n, max_tokens=20) for n in range(4)]
    together = engine.generate_sync(params, PROMPTS)
    for p, prompt, output in zip(params, PROMPTS, together, strict=True):
        stream = engine.generate_stream(p, prompt)
        assert "".join(stream) == output.text
        assert stream.output().token_ids == output.token_ids
        assert stream.finished


def test_prompts_as_text_and_as_ids(engine):
    ids = engine.model.tokenizer.encode("Hello")
    prompts = ["Hello", ids, tuple(ids), np.array(ids)]
    assert len({tuple(o.token_ids) for o in engine.generate_sync(GREEDY, prompts)}) == 1


def test_chat_prompts_keep_control_tokens_in_messages_as_text(engine):
    prompt = engine.apply_chat_template([Message("user", "a<|im_end|>b")])
    assert isinstance(prompt, ChatPrompt)
    end = engine.model.tokenizer.token_to_id("<|im_end|>")
    assert prompt.token_ids.count(end) == 1
    assert engine.model.tokenizer.encode(prompt).count(end) == 2  # as plain text it would be parsed
    (output,) = engine.generate_sync(GREEDY, [prompt])
    assert output.prompt_length == len(prompt.token_ids)


def test_end_of_sequence_ends_an_answer_unless_ignored(engine):
    (plain,) = engine.generate_sync(GREEDY, ["Hello"])
    stop = plain.token_ids[5]
    first = plain.token_ids.index(stop)
    (stopped,) = engine.generate_sync(SamplingParams(temperature=0.0, stop_token_ids=[stop]), ["Hello"])
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids[:-1] == plain.token_ids[:first]


def test_stop_strings_end_an_answer_before_them(engine):
    (plain,) = engine.generate_sync(GREEDY, ["What is 7 + 5?"])
    stop = plain.text[3:5]
    (stopped,) = engine.generate_sync(SamplingParams(temperature=0.0, max_tokens=12, stop=[stop]), ["What is 7 + 5?"])
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_stop_string_that_the_last_allowed_token_completes(engine):
    (plain,) = engine.generate_sync(GREEDY, ["What is 7 + 5?"])
    parts = [engine.model.tokenizer.token_bytes(t).decode("latin-1") for t in plain.token_ids]
    ends = [n for n in range(1, 12) if parts[n].isascii() and parts[n] and parts[n] not in "".join(parts[:n])]
    stop, count = parts[ends[0]], ends[0] + 1
    params = SamplingParams(temperature=0.0, max_tokens=count, stop=[stop])
    (stopped,) = engine.generate_sync(params, ["What is 7 + 5?"])
    assert (stopped.decoded_length, stopped.finish_reason) == (count, "stop")
    assert stop not in stopped.text


def test_cancel_keeps_what_was_said(quick):
    stream = quick.generate_stream(SamplingParams(max_tokens=240, ignore_eos=True, seed=1), "Hello")
    shown = next(stream)
    stream.cancel()
    stream.cancel()
    text = shown + "".join(stream)
    output = stream.output()
    assert output.finish_reason in ("cancelled", "length")
    assert output.text == text
    assert quick.generate_sync(GREEDY, ["Hello"])[0].finish_reason == "length"  # and the engine goes on


def test_an_unreferenced_stream_is_cancelled(quick):
    stream = quick.generate_stream(SamplingParams(max_tokens=240, ignore_eos=True, seed=1), "Hello")
    request = stream.request
    del stream
    gc.collect()
    assert quick.generate_sync(GREEDY, ["Hello"])[0].finish_reason == "length"
    while request.finish_reason is None:
        pass
    assert request.finish_reason in ("cancelled", "length")


def test_many_threads_at_once(quick):
    params = [SamplingParams(temperature=0.8, seed=n, max_tokens=10) for n in range(12)]
    alone = [quick.generate_sync(p, [PROMPTS[n % 4]])[0].token_ids for n, p in enumerate(params)]
    found: dict[int, list[int]] = {}

    def ask(n: int) -> None:
        found[n] = quick.generate_sync(params[n], [PROMPTS[n % 4]])[0].token_ids

    workers = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [found[n] for n in range(12)] == alone


def test_close_ends_streams_and_gives_the_thread_back(folder):
    before = len(threads())
    engine = Engine(EngineConfig(str(folder), dtype="f32"))
    stream = engine.generate_stream(SamplingParams(max_tokens=400, ignore_eos=True), "Hello")
    assert len(threads()) == before + 1
    engine.close()
    engine.close()
    assert len(threads()) == before
    if stream.output().finish_reason != "length":
        with pytest.raises(EngineClosedError):
            list(stream)
    with pytest.raises(EngineClosedError):
        engine.generate_sync(GREEDY, ["Hello"])


def test_an_unreferenced_engine_ends_its_thread(folder):
    before = len(threads())
    engine = Engine(EngineConfig(str(folder), dtype="f32"))
    del engine
    gc.collect()
    assert len(threads()) == before


def test_two_engines_in_one_process(folder, engine):
    with Engine(EngineConfig(str(folder), dtype="f32")) as other:
        assert other.generate_sync(GREEDY, PROMPTS)[2].token_ids == engine.generate_sync(GREEDY, PROMPTS)[2].token_ids


def test_an_engine_cannot_be_pickled(engine):
    with pytest.raises(ConfigError, match="pickled"):
        pickle.dumps(engine)


def test_values_come_from_the_request_else_the_engine_else_the_model(folder, tmp_path, checkpoints):
    model = texts.write_model(checkpoints.folder("chat"), tmp_path / "m")
    texts.change(model / "generation_config.json", temperature=0.0, do_sample=None, eos_token_id=2)
    with Engine(EngineConfig(str(model), dtype="f32"), defaults=SamplingParams(max_tokens=3)) as engine:
        first, second = engine.generate_sync(SamplingParams(), ["Hello", "Hello"])
        assert first.token_ids == second.token_ids  # the model author's default: temperature 0
        assert first.decoded_length == 3
        assert engine.generate_sync(SamplingParams(max_tokens=5), ["Hello"])[0].decoded_length == 5


def test_one_wrong_request_is_named_and_none_is_started(quick):
    with pytest.raises(ContextLengthError, match=r"prompt 1: .*256"):
        quick.generate_sync(GREEDY, ["Hello", "Hello " * 500])
    for prompt, words in ((3, "int"), ([], "empty"), ([-1], "-1"), ([10**9], "1000000000"), (["a"], "'a'")):
        with pytest.raises(RequestError, match=words):
            quick.generate_sync(GREEDY, [prompt])
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        quick.generate_sync([GREEDY, GREEDY], ["Hello"])
    with pytest.raises(RequestError, match="one text"):
        quick.generate_sync(GREEDY, "Hello")
    with pytest.raises(RequestError, match="ud800"):
        quick.generate_sync(GREEDY, ["\ud800"])
    assert quick.generate_sync(GREEDY, ["Hello"])[0].decoded_length == 12


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "words"),
    [
        ([], {}, RequestError, "empty"),
        ([1, 10**6], {}, RequestError, "1000000 is not in the vocabulary"),
        ([-1], {}, RequestError, "-1"),
        ([True], {}, RequestError, "True"),
        ([1.0], {}, RequestError, r"1\.0"),
        ([None], {}, RequestError, "None"),
        ([[1]], {}, RequestError, r"\[1\]"),
        (b"text", {}, RequestError, "bytes"),
        (None, {}, RequestError, "NoneType"),
        (np.zeros((1, 2), int), {}, RequestError, "not in the vocabulary|ndarray"),
        (np.array(3), {}, RequestError, "ndarray"),
        (np.array([], int), {}, RequestError, "empty"),
        (np.array([1.0]), {}, RequestError, r"1\.0"),
        (np.array([True]), {}, RequestError, "True"),
        ([1] * 256, {}, ContextLengthError, "256 tokens"),
        ([1], {"stop_token_ids": list(range(3, 19)), "max_tokens": 1}, None, ""),
        ([1], {"stop_token_ids": [10**6]}, RequestError, "1000000"),
        ([1], {"logit_bias": {10**6: 1.0}}, RequestError, "1000000"),
        ([1], {"allowed_token_ids": [10**6]}, RequestError, "1000000"),
        ([1], {"allowed_token_ids": []}, RequestError, "allowed_token_ids is empty"),
        ([1], {"allowed_token_ids": [2], "min_tokens": 2}, RequestError, "min_tokens"),
    ],
)
def test_every_way_of_asking_checks_the_request_and_starts_nothing(quick, prompt, params, kind, words):
    params = SamplingParams(**params)

    async def generate_async():
        await quick.generate_async(params, ["Hello", prompt])

    async def stream_async():
        await quick.stream_async(params, prompt).result()

    ways = (
        lambda: quick.generate_stream(params, prompt).result(),
        lambda: [s.result() for s in quick.generate_streams(params, prompt)],
        lambda: quick.generate_sync(params, ["Hello", prompt]),
        lambda: asyncio.run(generate_async()),
        lambda: asyncio.run(stream_async()),
    )
    for way in ways:
        with pytest.raises(kind, match=words) if kind else nullcontext():
            way()
    assert quick.stats()["steps"] == 0 or not kind


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", ">i4", "u8", "i8"])
def test_prompts_as_arrays_of_every_kind_of_integer(quick, dtype):
    expected = quick.generate_sync(GREEDY, [[5, 6, 7]])[0].token_ids
    prompts = np.array([[5, 6, 7], [5, 6, 7]], dtype)
    every = [*prompts, prompts[0][::1], range(5, 8), array.array("i", [5, 6, 7]), list(prompts[0])]
    assert [o.token_ids for o in quick.generate_sync(GREEDY, every)] == [expected] * 6
    assert [o.token_ids for o in quick.generate_sync(GREEDY, prompts)] == [expected] * 2
    assert [o.token_ids for o in quick.generate_sync(GREEDY, iter(prompts))] == [expected] * 2


def test_a_request_is_checked_once(quick, monkeypatch):
    checked, check = [], InputProcessor._check_ids
    monkeypatch.setattr(InputProcessor, "_check_ids", lambda self, ids: (checked.append(ids), check(self, ids)))
    quick.generate_sync(GREEDY, PROMPTS)
    assert len(checked) == len(PROMPTS)
    quick.generate_streams(replace(GREEDY, n=4), "Hello")
    assert len(checked) == len(PROMPTS) + 1  # the answers have one prompt


def test_params_and_config_of_another_type(quick, folder):
    for params in ({"max_tokens": 3}, None, [None]):
        with pytest.raises(RequestError):
            quick.generate_sync(params, ["Hello"])
    with pytest.raises(ConfigError, match="str"):
        Engine(str(folder))
    with Engine(EngineConfig(folder)) as engine:  # a Path
        assert engine.config.model_path == str(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_model_len": 513}, "context of 512"),
        ({"quant": "q9k"}, "did you mean"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"backend": "tpu"}, "tpu"),
        ({"model_path": "nowhere"}, "nowhere"),
        ({"kv_cache_memory": 1000, "max_model_len": 512}, "one sequence of 512 tokens"),
        ({"memory_limit": 100_000}, "the weights need"),
        ({"memory_limit": 400_000, "max_model_len": 512, "dtype": "bf16"}, "one sequence of 512 tokens"),
    ],
)
def test_configs_that_cannot_work(folder, config, words):
    before = len(threads())
    with pytest.raises(LlmrsError) as caught:
        Engine(EngineConfig(**{"model_path": str(folder), **config}))
    assert words in str(caught.value)
    assert len(threads()) == before


def test_the_default_context_is_shortened_to_what_fits(folder):
    with Engine(EngineConfig(str(folder), dtype="f32", kv_cache_memory=200_000)) as engine:
        with pytest.raises(ContextLengthError):
            engine.generate_sync(GREEDY, ["Hello " * 400])
        assert engine.generate_sync(GREEDY, ["Hello"])[0].decoded_length == 12


def broken(checkpoints, folder, spoil):
    model = texts.write_model(checkpoints.folder("chat"), folder / "broken")
    spoil(model)
    return model


SPOILED = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "no architecture": (lambda m: texts.change(m / "config.json", architectures=None), "names no architecture"),
    "unknown architecture": (lambda m: texts.change(m / "config.json", architectures=["Foo"]), "'Foo'"),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), "not JSON"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no weights"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "empty"),
    "cut-off weights": (
        lambda m: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors",
    ),
    "other shapes": (lambda m: texts.change(m / "config.json", intermediate_size=95), "shape"),
    "more layers": (lambda m: texts.change(m / "config.json", num_hidden_layers=4), "lacks"),
    "fewer layers": (lambda m: texts.change(m / "config.json", num_hidden_layers=2), "unexpected"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json"),
    "eos not in the tokenizer": (
        lambda m: texts.change(m / "tokenizer_config.json", eos_token="<nope>"),
        "<nope>",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_broken_model_folders(name, checkpoints, tmp_path):
    spoil, words = SPOILED[name]
    with pytest.raises(ModelError) as caught:
        Engine(EngineConfig(str(broken(checkpoints, tmp_path, spoil))))
    assert words in caught.value.message
    assert caught.value.hint


def test_a_tokenizer_without_the_eos_id(checkpoints, tmp_path):
    def spoil(model):
        texts.change(model / "tokenizer_config.json", eos_token=None)
        texts.change(model / "config.json", eos_token_id=319)
        texts.change(model / "generation_config.json", eos_token_id=319)
        texts.byte_level(300).save(str(model / "tokenizer.json"))

    with pytest.raises(ModelError, match="319"):
        Engine(EngineConfig(str(broken(checkpoints, tmp_path, spoil))))


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 / 0 }}", "{{ messages[0].content.nothing() }}", 3, "x" * 300_000])
def test_a_model_with_a_broken_template_completes_plain_text(source, checkpoints, tmp_path):
    model = broken(checkpoints, tmp_path, lambda m: texts.change(m / "tokenizer_config.json", chat_template=source))
    with Engine(EngineConfig(str(model), dtype="f32")) as engine:
        assert engine.generate_sync(GREEDY, ["Hello"])[0].decoded_length == 12
        for _ in range(2):
            with pytest.raises(ModelError, match=r"tokenizer_config.json: (the chat template|chat_template)") as caught:
                engine.apply_chat_template([Message("user", "Hi")])
            assert "chat: false" in caught.value.hint


def test_a_model_without_a_template_completes_plain_text(checkpoints, tmp_path):
    model = broken(checkpoints, tmp_path, lambda m: texts.change(m / "tokenizer_config.json", chat_template=None))
    with Engine(EngineConfig(str(model), dtype="f32")) as engine:
        assert engine.generate_sync(GREEDY, ["Hello"])[0].decoded_length == 12
        with pytest.raises(ModelError, match="no chat template"):
            engine.apply_chat_template([Message("user", "Hi")])


def test_progress_of_loading(folder):
    seen: list[tuple[int, int]] = []
    Engine(EngineConfig(str(folder)), progress=lambda done, total: seen.append((done, total))).close()
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 100_000


def test_what_is_asked_for_meanwhile_waits_for_a_step():
    """A flood of submissions must not delay the first requests."""
    worker, ran = Worker.__new__(Worker), []
    worker._commands, worker._closed, worker.core = queue.SimpleQueue(), False, SimpleNamespace(idle=False)

    def command(core: object) -> None:
        ran.append(core)
        worker._commands.put(command)

    worker._commands.put(command)
    worker._drain_commands()
    assert ran == [worker.core]
