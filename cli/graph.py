"""`llmrs graph`: a model's graph, without its weights and without a device."""

import typer

from llmrs.cli.terminal import guarded
from llmrs.core.ir import Graph


def graph(
    model: str = typer.Argument("demo", help="bundled name, model folder or Hugging Face id"),
    revision: str | None = typer.Option(None, help="of a Hugging Face id: branch, tag or commit"),
    offline: bool = typer.Option(False, "--offline", help="of Hugging Face ids use only what is in the cache"),
    fused: str | None = typer.Option(None, help="rewrite it to the fused ops of this backend; `all` for every one"),
) -> int:
    """Prints the model's graph, as described or as a backend runs it."""
    return guarded(lambda: show(model, revision, offline, fused))


def show(model: str, revision: str | None, offline: bool, fused: str | None) -> int:
    # here, since `llmrs --help` should not wait for them
    from llmrs.backends.fusion import fuse
    from llmrs.models.arch.families import graph_of, read_config
    from llmrs.models.hub.locate import locate

    config = read_config(locate(model, revision, offline=offline, weights=False))
    plain = graph_of(config)
    shown = fuse(plain, fused_ops(fused)) if fused is not None else plain
    print(f"{header(config.architecture, plain)}\n\n{shown}")
    return 0


def header(architecture: str, plain: Graph) -> str:
    """One line: what is in the graph, in numbers."""
    from llmrs.memory import kv_bytes_per_token
    from llmrs.models.files.weights import parameters

    layers, kv_bytes = len(plain.kv_types()), kv_bytes_per_token(plain, "bf16")
    return (
        f"{architecture}: {layers} layers, {parameters(plain):,} parameters, {kv_bytes:,} bytes of KV per token in bf16"
    )


def fused_ops(backend: str) -> frozenset[str]:
    from llmrs.backends.base import choose, find
    from llmrs.backends.fusion import FUSED_OPS

    return frozenset(FUSED_OPS) if backend == "all" else find(choose(backend)).fused_ops
