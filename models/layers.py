"""The pieces that families share, as equations. D: hidden size; canonical weight names are given beside each piece."""

from collections.abc import Callable

from llmrs.core.ir import Builder, Function, Graph, Segment, T, Type, Value, Weight
from llmrs.models.config import ModelConfig
from llmrs.models.rope import frequencies

LAYER = "layers.{i}."

# Canonical name -> Hugging Face name, for the decoders that follow Llama's naming.
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    **{f"layers.{{i}}.{n}": f"model.layers.{{i}}.self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"layers.{{i}}.{n}.bias": f"model.layers.{{i}}.self_attn.{n}_proj.bias" for n in "qkvo"},
    **{f"layers.{{i}}.{n}_norm": f"model.layers.{{i}}.self_attn.{n}_norm.weight" for n in "qk"},
    **{f"layers.{{i}}.{n}": f"model.layers.{{i}}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
    **{f"layers.{{i}}.{n}.bias": f"model.layers.{{i}}.mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
}


def vector(name: str, size: int) -> Weight:
    return Weight((Segment(name, size),))


def matrix(name: str, rows: int, columns: int) -> Weight:
    return Weight((Segment(name, rows),), (columns,))


def linear(b: Builder, x: Value, name: str, rows: int, *, bias: bool, shard: str = "rows") -> Value:
    """x w^T: weight `name` (rows, columns of x), and `name`.bias if there is one."""
    weights = [matrix(LAYER + name, rows, x.type.sizes[-1])]
    weights += [vector(f"{LAYER}{name}.bias", rows)] if bias else []
    return b("linear", x, *weights, shard=shard, to=name)


def norm(b: Builder, x: Value, name: str, eps: float, to: str) -> Value:
    return b("rms_norm", x, vector(name, x.type.sizes[-1]), eps=eps, to=to)


def attention(
    b: Builder, c: ModelConfig, x: Value, positions: Value, kv: Value, *, qk_norm: bool
) -> tuple[Value, Value]:
    """Grouped-query attention with rotary positions: q, k, v, o; with `qk_norm` q_norm and k_norm over each head."""
    widths = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
    q, k, v = (linear(b, x, n, w * c.head_size, bias=c.attention_bias) for n, w in widths.items())
    q, k, v = (b("heads", p, size=c.head_size, to=n) for p, n in ((q, "q"), (k, "k"), (v, "v")))
    if qk_norm:
        q, k = (norm(b, p, f"{LAYER}{n}_norm", c.norm_eps, to=n) for p, n in ((q, "q"), (k, "k")))
    q, k = (b("rope", p, positions, frequencies=frequencies(c), to=n) for p, n in ((q, "q"), (k, "k")))
    kv = b("store", k, v, kv, to="kv")
    y = b("attend", q, kv, scale=c.head_size**-0.5, to="y")
    return linear(b, y, "o", c.hidden, bias=c.attention_bias, shard="columns"), kv


def gated_mlp(b: Builder, c: ModelConfig, x: Value) -> Value:
    """down(silu(gate(x)) * up(x))."""
    gate, up = (linear(b, x, n, c.intermediate, bias=c.mlp_bias) for n in ("gate", "up"))
    return linear(b, b("silu_mul", gate, up, to="h"), "down", c.hidden, bias=c.mlp_bias, shard="columns")


def pre_norm_layer(c: ModelConfig, *, qk_norm: bool) -> Function:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    kv = Type("kv", (c.kv_heads, c.head_size))
    b = Builder("layer", x=Type("act", (T, c.hidden)), positions=Type("i32", (T,)), kv=kv)
    x, positions, kv_in = b.inputs
    n = norm(b, x, LAYER + "attn_norm", c.norm_eps, to="n")
    y, kv_out = attention(b, c, n, positions, kv_in, qk_norm=qk_norm)
    x = b("add", x, y, to="x")
    n = norm(b, x, LAYER + "mlp_norm", c.norm_eps, to="n")
    x = b("add", x, gated_mlp(b, c, n), to="x")
    return b.done(x, kv_out)


def decoder(c: ModelConfig, name: str, layer_of: Callable[[int], Function]) -> Graph:
    """embed, the layers, final_norm, and the head (or the embedding table, where tied) on each last token.

    `layer_of(i)` is the function of layer i.
    """
    layers = [layer_of(i) for i in range(c.layers)]
    ints = Type("i32", (T,))
    kv_types = {f"kv{i}": f.inputs[-1].type for i, f in enumerate(layers)}
    b = Builder("main", tokens=ints, positions=ints, **kv_types)
    tokens, positions, *kv = b.inputs
    table = matrix("embed", c.vocabulary, c.hidden)
    x = b("embed", tokens, table, to="x")
    for i, function in enumerate(layers):
        x, kv[i] = b.call(function, i, x, positions, kv[i])
    last = b("last", x, to="x")
    last = norm(b, last, "final_norm", c.norm_eps, to="n")
    head = table if c.tied else matrix("head", c.vocabulary, c.hidden)
    logits = b("head", last, head, to="logits")
    return Graph(name, {f.name: f for f in layers}, b.done(logits, *kv))
