"""The IR: what is refused, how it prints, and that fused graphs mean what they replace."""

import dataclasses
import random

import numpy as np
import pytest
import tiny

from llmrs.backends.fusion import FUSED_OPS, RULES, expand, fuse, fuse_graph
from llmrs.backends.linearize import inline
from llmrs.backends.torch.fusion import SINGLE_TOKEN_RULES, SMALL_BATCH_RULES
from llmrs.core.errors import GraphError
from llmrs.core.ir import Graph, S, T, Type, Weight, check
from llmrs.models.arch.builder import Builder
from llmrs.models.arch.families import graph_of, read_config
from llmrs.models.arch.layers import matrix, vector

X = Type("act", (T, 8))


def graph_from(build):
    """A graph whose main is `x -> build(builder, x)`."""
    b = Builder("main", x=X)
    return Graph("test", {}, b.done(build(b, b.inputs[0])))


@pytest.fixture
def qwen3(checkpoints):
    return graph_of(read_config(checkpoints.folder("qwen3")))


@pytest.mark.parametrize(
    ("op", "operands", "params", "word"),
    [
        ("linear", [matrix("w", 4, 9)], {"shard": "rows"}, "does not fit"),
        ("linear", [matrix("w", 4, 8), vector("b", 5)], {"shard": "rows"}, "bias"),
        ("linear", [matrix("w", 4, 8)], {"shard": "diagonal"}, "diagonal"),
        ("linear", [matrix("w", 4, 8)], {}, "shard"),
        ("rms_norm", [vector("w", 7)], {"eps": 1e-6}, "does not fit"),
        ("rms_norm", [vector("w", 8)], {"eps": 0.0}, "does not fit"),
        ("heads", [], {"size": 3}, "no heads"),
        ("add", [], {}, "missing"),
        ("conv", [], {}, "unknown op"),
    ],
)
def test_equations_that_do_not_type_are_refused(op, operands, params, word):
    with pytest.raises(GraphError, match=word) as error:
        graph_from(lambda b, x: b(op, x, *operands, to="y", **params))
    assert op in str(error.value)


def test_single_assignment_and_order_are_checked(qwen3):
    layer = qwen3.functions["layer"]
    for equations, word in [
        (layer.equations[::-1], "before it is assigned"),
        ((*layer.equations, layer.equations[0]), "assigned twice"),
        (layer.equations[:-1], "never assigned"),
    ]:
        broken = dataclasses.replace(layer, equations=equations)
        with pytest.raises(GraphError, match=word):
            check(Graph("broken", {"layer": broken}, qwen3.main))


def test_a_wrong_result_type_is_refused(qwen3):
    layer = qwen3.functions["layer"]
    first = layer.equations[0]
    wrong = dataclasses.replace(first.outs[0], type=Type("f32", (S, 1)))
    equations = (dataclasses.replace(first, outs=(wrong,)), *layer.equations[1:])
    with pytest.raises(GraphError, match="wrong type"):
        check(Graph("broken", {"layer": dataclasses.replace(layer, equations=equations)}, qwen3.main))


def test_calls_are_checked_against_the_signature(qwen3):
    equations = [dataclasses.replace(e, inputs=e.inputs[::-1]) if e.op == "call" else e for e in qwen3.main.equations]
    with pytest.raises(GraphError, match="signature"):
        check(Graph("broken", qwen3.functions, dataclasses.replace(qwen3.main, equations=tuple(equations))))
    with pytest.raises(GraphError, match="unknown function"):
        check(Graph("broken", {}, qwen3.main))


def test_prints_on_one_screen(qwen3):
    text = str(qwen3)
    assert len(text.splitlines()) < 50
    assert text.count("layer(") == 1
    assert "layer[0..2](x, positions, kv)" in text
    assert "kv1: kv[2,32] = write_kv(k3, v1, kv)" in text


def test_weights_are_rows_of_segments(qwen3):
    fused = fuse_graph(qwen3, ["merged_linear"])
    merged = next(e for e in fused.functions["layer"].equations if e.op == "merged_linear")
    weight = merged.inputs[1]
    assert isinstance(weight, Weight)
    assert [s.tensor for s in weight.segments] == ["layers.{i}.q", "layers.{i}.k", "layers.{i}.v"]
    assert weight.type.shape == (128 + 64 + 64, 64)
    assert {s for w in fused.weights() for s in w.segments} == {s for w in qwen3.weights() for s in w.segments}


@pytest.mark.parametrize("ops", [[], *[[op] for op in FUSED_OPS], FUSED_OPS])
@pytest.mark.parametrize("name", ["qwen3", "llama-3.1-bias"])
def test_fused_graphs_compute_the_same(name, ops, checkpoints):
    """The definition of each fused op, run by the reference, gives the very same numbers as the plain graph."""
    backend, config = tiny.backend_on("reference", checkpoints.folder(name))
    backend.allocate(64, 4, 4, 256)
    batch = tiny.prefill_batch(tiny.prompts(9, 2), 4)
    plain = backend.forward(batch)
    fused = fuse_graph(graph_of(config), ops)
    used = {e.op for f in fused.functions.values() for e in f.equations}
    assert set(ops) - used <= {"qk_norm_rope_write_kv" if "llama" in name else "rope_write_kv"}
    functions = {n: expand(f) for n, f in fused.functions.items()}
    backend.graph = Graph(fused.name, functions, expand(fused.main))
    check(backend.graph)
    np.testing.assert_array_equal(backend.forward(batch), plain)


def test_fused_op_unknown():
    with pytest.raises(GraphError, match="merged_linear"):
        fuse_graph(graph_from(lambda b, x: b("add", x, x, to="y")), ["magic"])


def test_inner_results_that_are_used_elsewhere_prevent_fusion():
    b = Builder("main", x=X, y=X, kv=Type("kv", (1, 8)), positions=Type("i32", (T,)))
    x, y, *_ = b.inputs
    total = b("add", x, y, to="s")
    n = b("rms_norm", total, vector("w", 8), eps=1e-6, to="n")
    out = b("add", n, total, to="out")  # uses the sum, which fused_add_rms_norm also gives: still fused
    fused = fuse_graph(Graph("test", {}, b.done(out)), ["fused_add_rms_norm"])
    assert [e.op for e in fused.main.equations] == ["fused_add_rms_norm", "add"]


def test_results_used_before_the_fused_equation_are_moved_behind_it():
    b = Builder("main", x=X, y=X)
    x, y = b.inputs
    total = b("add", x, y, to="s")
    double = b("add", total, total, to="d")
    n = b("rms_norm", total, vector("w", 8), eps=1e-6, to="n")
    out = b("add", n, double, to="out")
    fused = fuse_graph(Graph("test", {}, b.done(out)), ["fused_add_rms_norm"])
    assert [e.op for e in fused.main.equations] == ["fused_add_rms_norm", "add", "add"]


@pytest.mark.parametrize("seed", range(60))
def test_random_functions_keep_their_equations(seed):
    """Each value is still assigned before its use, and the definitions are the equations of before."""
    rng = random.Random(seed)
    b = Builder("main", x=X, y=X)
    values = list(b.inputs)
    for n in range(rng.randrange(3, 40)):
        x, y = rng.choice(values[-4:]), rng.choice(values[-4:])
        op = rng.choice(["add", "add", "rms_norm", "linear", "linear", "silu_and_mul"])
        operands = {"rms_norm": [x, vector(f"n{n}", 8)], "linear": [x, matrix(f"w{n}", 8, 8)]}.get(op, [x, y])
        params = {"rms_norm": {"eps": 1e-6}, "linear": {"shard": "rows"}}.get(op, {})
        values.append(b(op, *operands, to="v", **params))
    function = b.done(*rng.sample(values[2:], 2))
    for rules in (RULES.values(), [*RULES.values(), *SMALL_BATCH_RULES], SINGLE_TOKEN_RULES):
        fused = fuse(function, rules)
        check(Graph("random", {}, fused))
        assert sorted(map(str, expand(fused).equations)) == sorted(map(str, function.equations))


def test_fused_linear_takes_what_stands_around_it():
    b = Builder("main", x=X, y=X)
    x, y = b.inputs
    n = b("rms_norm", x, vector("n", 8), eps=1e-6, to="n")
    g, u = (b("linear", n, matrix(w, 8, 8), shard="rows", to=w) for w in ("g", "u"))
    d = b("linear", b("silu_and_mul", g, u, to="h"), matrix("d", 8, 8), shard="columns", to="d")
    merged = fuse(b.done(b("add", y, d, to="s")), RULES.values())
    one = fuse(merged, SINGLE_TOKEN_RULES)
    assert [(e.op, [b.op for b in e.body]) for e in one.equations] == [
        ("fused_linear", ["rms_norm", "linear", "linear", "silu_and_mul"]),
        ("fused_linear", ["linear", "add"]),
    ]
    assert [str(o) for o in one.equations[1].inputs] == ["h", "@d[8,8]", "y"]


def test_inlined_graphs_compute_the_same(checkpoints):
    backend, config = tiny.backend_on("reference", checkpoints.folder("qwen3"))
    backend.allocate(64, 4, 4, 256)
    batch = tiny.prefill_batch(tiny.prompts(9, 2), 4)
    plain = backend.forward(batch)
    for graph in (graph_of(config), fuse_graph(graph_of(config), FUSED_OPS)):
        function = inline(graph)
        check(Graph(graph.name, {}, function))
        backend.graph = Graph(graph.name, {}, expand(function))
        np.testing.assert_array_equal(backend.forward(batch), plain)
        assert list(backend.graph.weights()) == list(graph_of(config).weights())


def test_a_backend_without_a_rule_names_op_backend_and_model(checkpoints, monkeypatch):
    from llmrs.backends.reference import ops

    monkeypatch.delitem(ops.OPS, "silu_and_mul")
    with pytest.raises(GraphError, match=r"reference has no rule for silu_and_mul of qwen3"):
        tiny.backend_on("reference", checkpoints.folder("qwen3"))
