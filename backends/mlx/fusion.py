"""Fused ops of this backend alone: what takes all results of one merged linear takes the merged result instead.

So queries and keys are normalized and rotated together, and a kernel finds gate and up beside each other in memory.
"""

from llmrs.backends.fusion import Rule

QKV = "q k v = merged_linear x *w; qh = heads q; kh = heads k; vh = heads v; "
RULES = {
    rule.op: rule
    for rule in (
        Rule("qkv_norm_rope_write_kv", QKV + "qr c = qk_norm_rope_write_kv qh qw p kh kw vh kv -> qr c"),
        Rule("qkv_rope_write_kv", QKV + "qr c = rope_write_kv qh p kh vh kv -> qr c"),
        Rule("merged_linear_silu_and_mul", "g u = merged_linear x *w; h = silu_and_mul g u -> h"),
        Rule("merged_linear_gelu_and_mul", "g u = merged_linear x *w; h = gelu_and_mul g u -> h"),
    )
}
