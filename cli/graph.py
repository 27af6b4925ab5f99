"""`llmrs graph`: a model's graph, without weights or a device."""

import typer

from llmrs.core.ir import Graph


def graph(
    model: str = typer.Argument("demo", help="bundled name, model folder or Hugging Face id"),
    revision: str | None = typer.Option(None, help="branch, tag or commit of a Hugging Face id"),
    offline: bool = typer.Option(False, "--offline", help="use only the Hugging Face cache"),
    fused: str | None = typer.Option(None, help="apply the fusions of this backend; all: every fusion"),
) -> int:
    """Print a model's graph, plain or with a backend's fused ops."""
    # imported here to keep `llmrs --help` fast
    from llmrs.backends.fusion import fuse
    from llmrs.models.arch.families import graph_of, read_config
    from llmrs.models.hub.locate import locate

    config = read_config(locate(model, revision, offline=offline, weights=False))
    plain = graph_of(config)
    shown = fuse(plain, fused_ops(fused)) if fused is not None else plain
    print(f"{header(config.architecture, plain)}\n\n{shown}")
    return 0


def header(architecture: str, plain: Graph) -> str:
    from llmrs.memory import token_bytes
    from llmrs.models.files.weights import parameters

    kv_cache = f"{token_bytes(plain, 'bf16'):,} bytes of KV cache per token (bf16)"
    return f"{architecture}: {len(plain.kv_types())} layers, {parameters(plain):,} parameters, {kv_cache}"


def fused_ops(backend: str) -> frozenset[str]:
    from llmrs.backends.base import choose, find
    from llmrs.backends.fusion import FUSED_OPS

    return frozenset(FUSED_OPS) if backend == "all" else find(choose(backend)).fused_ops
