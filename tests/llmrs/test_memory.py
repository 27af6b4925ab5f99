"""Memory plans: numbers by hand, true advice, and the table on stderr."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrs import ConfigError, Engine, EngineConfig, LoadCancelledError, MemoryLimitError
from llmrs.cli import main
from llmrs.memory import MemoryPlan, WeightMemory, format_bytes, kv_bytes_per_token, plan_memory
from llmrs.models.arch.config import parse
from llmrs.models.arch.families import graph_of
from llmrs.quant.tensor import Stored

# Llama: embeddings 10 x 4; per layer norms 4 + 4, q and o 4 x 4 each, k and v 4 x 2 each, MLP 3 x 4 x 6; norm 4; head
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WEIGHTS = 40 + 3 * (8 + 2 * 16 + 2 * 8 + 72) + 4 + 40
GRAPH = graph_of(parse(Path("config.json"), TINY, {}))
TOKEN = 2 * 3 * 2  # keys and values of 3 layers, one head of size 2


def tiny(free: int, block_size: int = 4, dtype: str = "f32", context: int = 1000, **config) -> MemoryPlan:
    dense = [Stored("f32", (WEIGHTS,), 4 * WEIGHTS)]
    weights = WeightMemory.of(dense, dtype, keeps_quantized=True)
    return plan_memory(GRAPH, weights, EngineConfig(dtype=dtype, **config), context, block_size, (dtype, dtype), free)


def test_numbers_by_hand():
    f = tiny(4 * WEIGHTS + 10_000, max_model_len=50, max_num_seqs=3)
    assert (f.weight_bytes, f.kv_bytes_per_token, f.kv_budget) == (4 * WEIGHTS, 4 * TOKEN, 9000)
    assert f.max_blocks == 9000 // (4 * TOKEN * 4) == 46
    assert f.max_len_one_seq == 184
    assert f.max_concurrency == 3  # 13 blocks each
    assert (f.max_model_len, f.num_blocks) == (50, 39)
    assert f.complete
    assert f.advice() == []
    half = tiny(4 * WEIGHTS + 10_000, dtype="bf16")
    assert (half.weight_bytes, half.kv_bytes_per_token) == (2 * WEIGHTS, 2 * TOKEN)
    assert kv_bytes_per_token(GRAPH, "f16") == 2 * TOKEN
    assert kv_bytes_per_token(GRAPH, "fp8") == TOKEN + 2 * 3 * 4  # a scale for keys and one for values, in each layer


def test_the_default_context():
    assert tiny(10**9).requested_len == 1000
    assert tiny(10**9, context=100_000).requested_len == 4096
    with pytest.raises(ConfigError, match="more than the model's context of 1000"):
        tiny(10**9, max_model_len=1001)


def test_a_context_that_was_not_asked_for_is_shortened():
    f = tiny(10**9, kv_cache_memory=4 * TOKEN * 4 * 10)
    assert (f.max_model_len, f.num_blocks, f.max_concurrency, f.complete) == (40, 10, 1, False)
    f.check()
    assert f.advice() == [
        "max_model_len of at most 40 fits",
        "kv_cache_dtype: bf16 makes room for 80 tokens",
    ]


def test_a_context_that_was_asked_for_is_refused():
    f = tiny(10**9, kv_cache_memory=4 * TOKEN * 4 * 10, max_model_len=41)
    assert (f.max_model_len, f.num_blocks) == (0, 0)
    with pytest.raises(MemoryLimitError, match=r"one sequence of 41 tokens needs 1\.97 kB .* 1\.92 kB may") as caught:
        f.check()
    assert caught.value.hint == "max_model_len of at most 40 fits"
    nothing = tiny(10**9, kv_cache_memory=10)
    with pytest.raises(MemoryLimitError) as caught:
        nothing.check()
    assert "kv_cache_memory" in caught.value.hint


def test_weights_that_do_not_fit():
    f = tiny(4 * WEIGHTS - 1)
    with pytest.raises(MemoryLimitError, match=r"weights need .* in f32, and .* are free") as caught:
        f.check()
    assert caught.value.hint == f"dtype: bf16 needs {format_bytes(2 * WEIGHTS)}"
    for too_large in (tiny(2 * WEIGHTS - 1), tiny(2 * WEIGHTS - 1, dtype="bf16")):
        assert too_large.advice() == ["use a smaller model"]
        assert not too_large.complete
    assert tiny(4 * WEIGHTS + 10).advice()  # room for the weights alone


def test_a_memory_limit_that_is_too_low_for_the_weights():
    """The error names a sufficient limit."""
    wanted = {"max_model_len": 100, "dtype": "bf16"}
    f = tiny(10**6, memory_limit=2 * WEIGHTS - 1, **wanted)
    with pytest.raises(
        MemoryLimitError, match=r"weights need .* in bf16, and memory_limit allows .*; .* 100"
    ) as caught:
        f.check()
    assert format_bytes(2 * WEIGHTS) in caught.value.message
    assert format_bytes(f.required) in caught.value.message
    enough = int(re.search(r"memory_limit of at least (\d+) has room for 100 tokens", caught.value.hint)[1])
    assert tiny(10**6, memory_limit=enough, **wanted).max_model_len == 100
    assert tiny(10**6, memory_limit=enough - 8 * TOKEN, **wanted).max_model_len == 0  # a block less
    assert tiny(enough - 1, memory_limit=2 * WEIGHTS - 1, **wanted).advice() == ["use a smaller model"]
    narrower = tiny(10**6, memory_limit=2 * WEIGHTS, dtype="f32").advice()
    assert narrower[0] == f"dtype: bf16 needs {format_bytes(2 * WEIGHTS)}"
    assert narrower[1].startswith("memory_limit of at least")


def test_a_memory_limit_that_is_too_low_for_the_context():
    f = tiny(10**6, memory_limit=4 * WEIGHTS + 1000, max_model_len=100)
    with pytest.raises(MemoryLimitError, match="one sequence of 100 tokens needs") as caught:
        f.check()
    assert caught.value.hint == "max_model_len of at most 16 fits"
    assert f.advice()[1:] == [
        "kv_cache_dtype: bf16 makes room for 36 tokens",
        f"memory_limit of at least {f.required} has room for 100 tokens",
    ]
    assert tiny(10**6, memory_limit=f.required, max_model_len=100).max_model_len == 100
    fixed = tiny(10**6, memory_limit=4 * WEIGHTS + 1000, max_model_len=100, kv_cache_memory=1000)
    assert not any("memory_limit" in line for line in fixed.advice())  # kv_cache_memory decides


def test_fewer_sequences_than_asked_for_run_all_the_same():
    f = tiny(10**9, kv_cache_memory=4 * TOKEN * 4 * 10, max_model_len=12, max_num_seqs=4)
    assert (f.max_model_len, f.max_concurrency, f.num_blocks, f.complete) == (12, 3, 10, False)
    f.check()
    assert f.advice() == [
        "max_num_seqs of at most 3 has room for full contexts",
        "max_model_len of at most 8 lets 4 run at once",
    ]


def test_more_for_the_kv_cache_than_there_is():
    f = tiny(4 * WEIGHTS + 1000, kv_cache_memory=10**9)
    assert not f.complete
    assert f.advice() == ["the weights leave 1.00 kB free"]


def plans():
    return st.builds(
        MemoryPlan,
        dtype=st.sampled_from(["f32", "bf16"]),
        kv_dtype=st.sampled_from(["f32", "bf16", "f16"]),
        weights=st.integers(1, 300).map(lambda n: WeightMemory(4 * n, "")),
        kv_bytes_per_token=st.integers(1, 50).map(lambda n: 4 * n),
        available=st.integers(0, 10**5),
        kv_budget=st.integers(0, 10**5),
        block_size=st.integers(1, 64),
        model_max_len=st.just(500),
        requested_len=st.integers(2, 500),
        explicit=st.booleans(),
        max_num_seqs=st.integers(1, 40),
    )


@given(plans())
def test_what_is_allocated_stays_within_the_budget_and_uses_it(f):
    block = f.kv_bytes_per_token * f.block_size
    assert f.num_blocks * block <= f.kv_budget
    if f.max_model_len:
        each = -(-f.max_model_len // f.block_size)
        assert f.num_blocks >= each  # one whole sequence, always
        assert f.num_blocks == each * f.max_num_seqs or (f.num_blocks + 1) * block > f.kv_budget
        assert f.max_concurrency * each * block <= f.kv_budget < (f.max_concurrency + 1) * each * block
        assert f.max_model_len == f.requested_len or not f.explicit
    else:
        assert f.requested_len * f.kv_bytes_per_token > f.kv_budget - block
    if f.complete:
        assert f.weight_bytes + f.num_blocks * block <= f.available
        assert f.max_concurrency >= f.max_num_seqs
    assert bool(f.advice()) != f.complete


@given(plans())
def test_advice_is_true(f):
    if f.weight_bytes > f.available:
        return
    for line in f.advice():
        number = int(re.sub(r"bf16", "", line).split("most ")[-1].split()[0]) if "most" in line else 0
        if line.startswith("max_model_len") and line.endswith("fits"):
            assert replace(f, requested_len=number, explicit=True).max_model_len == number
            assert number == f.model_max_len or not replace(f, requested_len=number + 1, explicit=True).max_model_len
        if line.startswith("max_model_len") and line.endswith("run at once"):
            assert (
                replace(f, requested_len=number).max_concurrency
                >= f.max_num_seqs
                > replace(f, requested_len=number + 1).max_concurrency
            )
        if line.startswith("max_num_seqs"):
            assert f.max_concurrency == number < f.max_num_seqs
        if line.startswith("kv_cache_dtype"):
            longer = int(re.search(r"(\d+) tokens", line)[1])
            assert (
                replace(
                    f,
                    requested_len=longer,
                    explicit=True,
                    kv_bytes_per_token=f.kv_bytes_per_token // 2,
                    kv_dtype="bf16",
                ).max_model_len
                == longer
            )


@pytest.mark.parametrize(("backend", "kv"), [("torch", "auto"), ("torch", "fp8"), ("reference", "fp8")])
def test_the_backend_allocates_what_was_computed(backend, kv):
    budget = 300_000
    config = EngineConfig(dtype="f32", kv_cache_dtype=kv, kv_cache_memory=budget, backend=backend, device="cpu")
    with Engine(config) as engine:
        kv = engine._worker.core.backend.kv
        there = sum(tensor.nbytes for pair in kv for tensor in (pair.keys, pair.values))
        block = engine.memory_plan.kv_bytes_per_token * engine.memory_plan.block_size
        assert there == engine.memory_plan.num_blocks * block
        assert budget - block < there <= budget
        assert (
            engine.memory_plan.max_model_len
            == engine.memory_plan.max_len_one_seq
            == engine.memory_plan.num_blocks * engine.memory_plan.block_size
        )


def test_progress_is_told_before_anything_is_loaded():
    seen = []
    with Engine(EngineConfig(max_num_seqs=2), on_memory_plan=seen.append, progress=lambda *n: seen.append(n)) as engine:
        assert seen[0].weight_bytes == engine.memory_plan.weight_bytes
        assert seen[0].complete
        assert seen[1:]
        assert not any(isinstance(s, MemoryPlan) for s in seen[1:])
    with pytest.raises(MemoryLimitError):
        Engine(EngineConfig(max_model_len=4096, kv_cache_memory=1000), on_memory_plan=seen.append)
    assert not seen[-1].complete  # reported, then refused before loading
    with pytest.raises(LoadCancelledError):
        Engine(EngineConfig(), on_fit=lambda plan: False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


RUN = ["run", "--model", "demo", "--prompts", "Hi", "--max-tokens", "2"]
TITLES = ["weights", "KV cache", "free", "max length", "concurrency"]


def titles(text: str) -> list[str]:
    return [t for line in re.split(r"[\r\n]+", text) for t in (*TITLES, "advice") if line.startswith(t)]


def test_the_table_on_a_terminal_and_in_scripts(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(RUN) == 0
    assert titles(capsys.readouterr().err) == []
    assert main([*RUN, "--kv-cache-memory", "50000"]) == 0  # the context is shortened
    assert titles(capsys.readouterr().err) == [*TITLES, "advice"]
    assert main([*RUN, "--kv-cache-memory", "50000", "--max-model-len", "4000"]) == 2
    captured = capsys.readouterr()
    assert titles(captured.err) == [*TITLES, "advice"]
    assert captured.out == ""
    assert "error: one sequence of 4000 tokens" in captured.err
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(RUN) == 0
    assert titles(terminal.getvalue()) == TITLES
