"""`llmrs graph`: a model's graph, without weights or a device."""

import typer


def graph(
    model: str = typer.Argument("demo", help="bundled name, model folder, .gguf file or Hugging Face id"),
    revision: str | None = typer.Option(None, help="branch, tag or commit of a Hugging Face id"),
    offline: bool = typer.Option(False, "--offline", help="use only the Hugging Face cache"),
    fused: str | None = typer.Option(None, help="apply the fusions of this backend; all: every fusion"),
) -> int:
    """Print a model's graph, plain or with a backend's fused ops."""
    # imported here to keep `llmrs --help` fast
    from llmrs.backends.base import load_backend, resolve
    from llmrs.backends.fusion import FUSED_OPS, fuse_graph
    from llmrs.memory import format_bytes, kv_bytes_per_token
    from llmrs.models.arch.families import graph_of
    from llmrs.models.arch.gguf import model_config
    from llmrs.models.files.formats import stored_formats
    from llmrs.models.files.weights import num_parameters
    from llmrs.models.hub.resolve import resolve_model

    path = resolve_model(model, revision, offline=offline, weights=False)
    config = model_config(path)
    plain = graph_of(config)
    kv_cache = f"{kv_bytes_per_token(plain, 'bf16'):,} bytes of KV cache per token (bf16)"
    header = f"{config.architecture}: {len(plain.kv_types())} layers, {num_parameters(plain):,} parameters, {kv_cache}"
    if not path.is_dir() or any(path.glob("*.safetensors")):  # else only its config.json is there
        formats = (f"{s.format} {s.tensors} tensors {format_bytes(s.nbytes)}" for s in stored_formats(path))
        header += f"\nweights: {', '.join(formats)}"
    if fused is None:
        print(f"{header}\n\n{plain}")
    else:
        ops = frozenset(FUSED_OPS) if fused == "all" else load_backend(resolve(fused)).fused_ops
        print(f"{header}\n\n{fuse_graph(plain, ops)}")
    return 0
