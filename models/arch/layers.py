"""Layers that families share, as equations. Docstrings give the canonical weight names."""

from collections.abc import Callable

from llmrs.core.ir import Function, Graph, Segment, T, Type, Value, Weight
from llmrs.models.arch.builder import Builder
from llmrs.models.arch.config import LayerKind, ModelConfig
from llmrs.models.arch.rope import frequencies

LAYER = "layers.{i}."
MLP = ("gate", "up", "down")
# Canonical weight name -> Hugging Face name, for families with Llama's naming.
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.router": "model.layers.{i}.mlp.gate.weight",
    **{f"layers.{{i}}.{n}": f"model.layers.{{i}}.self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"layers.{{i}}.{n}.bias": f"model.layers.{{i}}.self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"layers.{{i}}.{n}_norm": f"model.layers.{{i}}.self_attn.{n}_norm.weight" for n in "qk"},
    **{f"layers.{{i}}.{n}": f"model.layers.{{i}}.mlp.{n}_proj.weight" for n in MLP},
    **{f"layers.{{i}}.{n}.bias": f"model.layers.{{i}}.mlp.{n}_proj.bias" for n in MLP},
    **{f"layers.{{i}}.experts.{{e}}.{n}": f"model.layers.{{i}}.mlp.experts.{{e}}.{n}_proj.weight" for n in MLP},
}


def vector(name: str, size: int) -> Weight:
    return Weight((Segment(name, size),))


def matrix(name: str, rows: int, columns: int) -> Weight:
    return Weight((Segment(name, rows),), (columns,))


def linear(b: Builder, x: Value, name: str, rows: int, *, bias: bool, shard: str = "rows") -> Value:
    """x w^T + bias. Weight `name` (rows, x.shape[-1]), optional `name`.bias (rows,)."""
    weights = [matrix(LAYER + name, rows, x.type.sizes[-1])]
    weights += [vector(f"{LAYER}{name}.bias", rows)] if bias else []
    return b("linear", x, *weights, shard=shard, to=name)


def norm(b: Builder, x: Value, name: str, eps: float, to: str, offset: float = 0.0) -> Value:
    """RMS norm, scaled by weight + offset."""
    params = {"offset": offset} if offset else {}
    return b("rms_norm", x, vector(name, x.type.sizes[-1]), eps=eps, to=to, **params)


def attention(
    b: Builder, c: ModelConfig, kind: LayerKind, x: Value, positions: Value, kv: Value,
    *, qk_norm: bool, norm_offset: float = 0.0,
) -> tuple[Value, Value]:  # fmt: skip
    """GQA with RoPE. Weights q, k, v, o; with `qk_norm` also q_norm and k_norm, over each head."""
    widths = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
    q, k, v = (linear(b, x, n, w * c.head_dim, bias=c.attention_bias) for n, w in widths.items())
    q, k, v = (b("heads", p, size=c.head_dim, to=n) for p, n in ((q, "q"), (k, "k"), (v, "v")))
    if qk_norm:
        q, k = (norm(b, p, f"{LAYER}{n}_norm", c.norm_eps, to=n, offset=norm_offset) for p, n in ((q, "q"), (k, "k")))
    freqs = frequencies(c.local_rope if kind.window else c.rope, c)
    q, k = (b("rope", p, positions, frequencies=freqs, to=n) for p, n in ((q, "q"), (k, "k")))
    kv = b("write_kv", k, v, kv, to="kv")
    window = {"window": kind.window} if kind.window else {}
    y = b("attend", q, kv, scale=c.attention_scale, to="y", **window)
    return linear(b, y, "o", c.hidden_size, bias=c.output_bias, shard="columns"), kv


def gated_mlp(b: Builder, c: ModelConfig, x: Value) -> Value:
    """down(act(gate(x)) * up(x))."""
    gate, up = (linear(b, x, n, c.intermediate_size, bias=c.mlp_bias) for n in ("gate", "up"))
    h = b({"silu": "silu_and_mul", "gelu_tanh": "gelu_and_mul"}[c.activation], gate, up, to="h")
    return linear(b, h, "down", c.hidden_size, bias=c.mlp_bias, shard="columns")


def moe_mlp(b: Builder, c: ModelConfig, x: Value) -> Value:
    """The gated MLP of each token's top-k experts, weighted by the router."""
    e = c.experts
    assert e is not None, "MoE layer without experts"
    up, down = (e.intermediate_size, c.hidden_size), (c.hidden_size, e.intermediate_size)
    stacks = [
        Weight(tuple(Segment(f"{LAYER}experts.{n}.{name}", rows) for n in range(e.num_experts)), (columns,))
        for name, (rows, columns) in zip(MLP, (up, up, down), strict=True)
    ]
    router = matrix(LAYER + "router", e.num_experts, c.hidden_size)
    return b("moe", x, router, *stacks, top_k=e.num_experts_per_tok, norm_topk_prob=e.norm_topk_prob, to="y")


def layer_inputs(c: ModelConfig) -> dict[str, Type]:
    kv = Type("kv", (c.num_kv_heads, c.head_dim))
    return {"x": Type("act", (T, c.hidden_size)), "positions": Type("i32", (T,)), "kv": kv}


def pre_norm_layer(c: ModelConfig, kind: LayerKind, name: str, *, qk_norm: bool) -> Function:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    b = Builder(name, **layer_inputs(c))
    x, positions, kv = b.inputs
    n = norm(b, x, LAYER + "attn_norm", c.norm_eps, to="n")
    y, kv = attention(b, c, kind, n, positions, kv, qk_norm=qk_norm)
    x = b("add", x, y, to="x")
    n = norm(b, x, LAYER + "mlp_norm", c.norm_eps, to="n")
    return b.done(b("add", x, moe_mlp(b, c, n) if kind.is_moe else gated_mlp(b, c, n), to="x"), kv)


def decoder(
    c: ModelConfig, layer_of: Callable[[LayerKind, str], Function],
    *, embedding_scale: float = 1.0, norm_offset: float = 0.0,
) -> Graph:  # fmt: skip
    """The whole model: embed, layers, final_norm, and lm_head (or the tied embed) on the logits rows.

    `layer_of(kind, name)` builds the function of a layer kind.
    """
    kinds = dict.fromkeys(c.layer_kinds)
    functions = {kind: layer_of(kind, "layer" if len(kinds) == 1 else str(kind)) for kind in kinds}
    ints = Type("i32", (T,))
    kv_types = {f"kv{i}": functions[kind].inputs[-1].type for i, kind in enumerate(c.layer_kinds)}
    b = Builder("main", tokens=ints, positions=ints, **kv_types)
    tokens, positions, *kv = b.inputs
    table = matrix("embed", c.vocab_size, c.hidden_size)
    x = b("embed", tokens, table, to="x")
    if embedding_scale != 1.0:
        x = b("mul_scalar", x, by=embedding_scale, to="x")
    for i, kind in enumerate(c.layer_kinds):
        x, kv[i] = b.call(functions[kind], i, x, positions, kv[i])
    last = norm(b, b("gather_logits_rows", x, to="x"), "final_norm", c.norm_eps, to="n", offset=norm_offset)
    head = table if c.tie_word_embeddings else matrix("lm_head", c.vocab_size, c.hidden_size)
    main = b.done(b("lm_head", last, head, to="logits"), *kv)
    return Graph(c.name, {f.name: f for f in functions.values()}, main)
