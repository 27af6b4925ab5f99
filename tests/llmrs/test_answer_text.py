"""Output text: control tokens, and stop strings that consist of them or start before min_tokens."""

import asyncio

import pytest
import texts
from tiny import BACKENDS

from llmrs import Engine, EngineConfig, SamplingParams

START, EOS, A, B = 1, 2, 67, 68  # <|im_start|>, <|im_end|>, and the letters a and b


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request, checkpoints, tmp_path_factory):
    folder = texts.write_model(checkpoints.folder("chat"), tmp_path_factory.mktemp("whole") / "model")
    backend, _, device = request.param.partition(":")
    with Engine(EngineConfig(str(folder), backend=backend, device=device or "cpu", dtype="f32")) as engine:
        assert [engine.model.tokenizer.inner.id_to_token(i) for i in (START, EOS, A, B)] == [
            *texts.CONTROL[1:],
            "a",
            "b",
        ]
        yield engine


def says(engine, *ids, **options):
    """Generates these tokens, in any order."""
    params = SamplingParams(seed=3, allowed_token_ids=list(ids), **{"max_tokens": 12, "min_tokens": 0, **options})
    return engine.generate_sync(params, ["Hello"])[0]


def decoded(engine, ids, skip):
    return engine.model.tokenizer.inner.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
def test_control_tokens_are_text_if_asked_for(engine, skip):
    think = engine.model.tokenizer.token_to_id("</think>")
    mixed = {"seed": 2, "allowed_token_ids": [START, A, B, think], "max_tokens": 30, "skip_special_tokens": skip}
    outputs = engine.generate_sync(SamplingParams(n=3, **mixed), ["Hello"])
    assert all({START, A, think} <= set(o.token_ids) for o in outputs)
    assert [o.text for o in outputs] == [decoded(engine, o.token_ids, skip) for o in outputs]
    assert "".join(engine.generate_stream(SamplingParams(**mixed), "Hello")) == outputs[0].text

    async def streamed():
        return "".join([piece async for piece in engine.stream_async(SamplingParams(**mixed), "Hello")])

    assert asyncio.run(streamed()) == outputs[0].text


@pytest.mark.parametrize("how", [{}, {"stop_token_ids": [EOS], "ignore_eos": True}])
def test_the_token_that_ends_an_answer_is_text_too_if_asked_for(engine, how):
    for skip, text in [(True, ""), (False, "<|im_end|>")]:
        output = says(engine, EOS, skip_special_tokens=skip, **how)
        assert (output.text, output.token_ids, output.finish_reason) == (text, [EOS], "stop")


@pytest.mark.parametrize("skip", [True, False])
def test_stop_texts_may_be_control_tokens(engine, skip):
    more = {"skip_special_tokens": skip}
    for token, stop in [(START, "<|im_start|>"), (EOS, "<|im_end|>")]:
        output = says(engine, token, stop=[stop], ignore_eos=True, **more)
        assert (output.text, output.token_ids, output.finish_reason) == ("", [token], "stop")
    output = says(engine, EOS, stop=["<|im_end|>"], **more)  # EOS ends the request anyway
    assert (output.text, output.finish_reason) == ("", "stop")
    output = says(engine, START, stop=["<|im_start|>"], stop_token_ids=[START], **more)
    assert (output.text, output.finish_reason) == ("", "stop")
    output = says(engine, EOS, stop=["<|im_end|>"], ignore_eos=True, min_tokens=3, **more)
    assert (output.text, output.decoded_length) == ("" if skip else "<|im_end|>" * 3, 4)


@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_text_may_go_over_text_and_control_tokens(engine, skip):
    plain = says(engine, START, A, B, max_tokens=30)
    at = next(
        n for n, i in enumerate(plain.token_ids) if i == START and n > 1 and START not in plain.token_ids[n - 2 : n]
    )
    stop = decoded(engine, plain.token_ids[at - 2 : at + 1], False)[:-3]
    full = decoded(engine, plain.token_ids, False)
    output = says(engine, START, A, B, max_tokens=30, stop=[stop], skip_special_tokens=skip)
    assert output.finish_reason == "stop"
    assert output.decoded_length == at + 1
    assert output.text == full[: full.index(stop)].replace("" if not skip else "<|im_start|>", "")


@pytest.mark.parametrize(("minimum", "length"), [(0, 4), (3, 4), (4, 5), (7, 8), (12, 12)])
def test_a_stop_text_may_begin_before_min_tokens(engine, minimum, length):
    params = SamplingParams(n=2, max_tokens=12, allowed_token_ids=[A], stop=["aaaa"], min_tokens=minimum)
    for output in engine.generate_sync(params, ["Hello"]):
        assert output.decoded_length == length
        assert (output.text, output.finish_reason) == (
            ("a" * 12, "length") if minimum == 12 else ("a" * (length - 4), "stop")
        )


def test_a_stop_text_that_only_the_end_completes(engine):
    half = engine.model.tokenizer.token_to_id("â")  # of a character
    output = says(engine, half, max_tokens=1, stop=["\ufffd"])
    assert (output.text, output.finish_reason) == ("", "stop")
