"""`llmrs quantize` and `llmrs imatrix`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrs.cli.loading import show_progress
from llmrs.cli.outputs import check_outputs
from llmrs.cli.settings import load_settings
from llmrs.cli.terminal import StatusLine, one_line
from llmrs.core.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from llmrs.config import EngineConfig
    from llmrs.conversion import Converted, Summary
    from llmrs.evaluation import Evaluation, Sample
    from llmrs.model import Model

ModelName = Annotated[
    str | None, typer.Argument(help="bundled name, model folder, .gguf file or Hugging Face id "
                                    "(default: that of ./config.yaml, else demo)")]  # fmt: skip
Output = Annotated[str | None, typer.Option("--output", "-o", help="file or folder to write")]
Force = Annotated[bool, typer.Option("--force", help="replace what is there")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a Hugging Face id")]
Offline = Annotated[bool, typer.Option("--offline", help="use only the Hugging Face cache")]
EVALUATED = "KL divergence and perplexity"


def quantize(
    model: ModelName = None,
    quant: Annotated[str | None, typer.Option("--quant", "--isq", help="q4k, q4_k_m, q8_0, mlx4, fp8, ...")] = None,
    output: Output = None,
    force: Force = False,
    imatrix: Annotated[str | None, typer.Option(help="importance matrix, of `llmrs imatrix` or llama.cpp")] = None,
    evaluate: Annotated[str | None, typer.Option("--eval", help=f"then print {EVALUATED} on a text, or on prompts and "
                                                 "answers (.jsonl)")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, gpu, or one GPU such as cuda:0")] = None,
    revision: Revision = None,
    offline: Offline = False,
) -> int:  # fmt: skip
    """Quantize a model: writes a GGUF file, or a folder for mlx* and fp8."""
    # imported here to keep `llmrs --help` fast
    from llmrs.conversion import quantize_model
    from llmrs.imatrix import read_importance
    from llmrs.quant.schemes import find_scheme

    config = engine_config(model, revision, offline, device)
    if (name := quant or config.quant) is None:
        raise ConfigError("quant: no type is given", "add --quant q4k, for example")
    scheme = find_scheme(name)
    if imatrix is not None and scheme.kind not in ("recipe", "mix"):
        raise ConfigError(f"imatrix: {scheme.name} does not use one", "leave it out, or choose a type such as q4k")
    source = read(config)
    path = output_path(output, source, f"-{scheme.name}{'.gguf' if scheme.is_gguf else ''}", config, force)
    if scheme.is_gguf != (path.suffix == ".gguf"):
        kind = "a GGUF file" if scheme.is_gguf else "a folder"
        raise ConfigError(f"output: {path} is no name for {scheme.name}, which is written as {kind}",
                          f"add .gguf: {path}.gguf" if scheme.is_gguf else "leave out .gguf")  # fmt: skip
    samples = None if evaluate is None else samples_of(Path(evaluate), source)
    importance = None if imatrix is None else read_importance(Path(imatrix), source.graph)
    where = quantizer_device(config) if scheme.is_gguf else None
    summary = quantize_model(
        source, scheme, path, importance=importance, force=force, on_matrix=print_matrix, device=where
    )
    for line in summary_lines(path, summary):
        print(line, flush=True)
    if samples is not None:
        for line in evaluation_lines(compare(source, path, samples, config)):
            print(line)
    return 0


def measure_imatrix(
    model: ModelName = None,
    text: Annotated[str | None, typer.Option(help="text to measure on")] = None,
    output: Output = None,
    force: Force = False,
    revision: Revision = None,
    offline: Offline = False,
) -> int:
    """Measure an importance matrix for `llmrs quantize --imatrix`, in llama.cpp's format."""
    from llmrs.imatrix import measure, read_text_tokens
    from llmrs.models.files.imatrix import write_imatrix

    if text is None:
        raise ConfigError("text: no text is given", "add --text FILE: text like that which the model will read")
    config = engine_config(model, revision, offline)
    source = read(config)
    path = output_path(output, source, "-imatrix.gguf", config, force)
    tokens, chunk = read_text_tokens(Path(text), source)
    line = StatusLine()
    try:
        sums = measure(
            source.graph, source.open_weights(), tokens, chunk,
            lambda done, total: line.show(lambda: f"measuring: {done} of {total} chunks of {chunk} tokens"),
        )  # fmt: skip
    finally:
        line.clear()
    write_imatrix(path, sums, Path(text).name, len(tokens) // chunk, chunk, force=force)
    print(f"{path}: {len(sums)} tensors, measured on {len(tokens) // chunk * chunk:,} tokens")
    return 0


def engine_config(model: str | None, revision: str | None, offline: bool, device: str | None = None) -> "EngineConfig":
    """That of ./config.yaml, with another model if one is given. Raises ConfigError."""
    flags: dict[str, object] = {"offline": True} if offline else {}
    if model is not None:
        flags |= {"model_path": model, "revision": None}
    if revision is not None:
        flags["revision"] = revision
    if device is not None:
        flags["device"] = device
    return load_settings(None, flags).engine


def quantizer_device(config: "EngineConfig") -> str | None:
    """Of `convert`: a GPU, where the backend has one for it. Without any backend NumPy quantizes."""
    from llmrs.backends.base import load_backend, pick_device, resolve

    try:
        kind = load_backend(resolve(config.backend))
    except BackendError:
        if (config.backend, config.device) != ("auto", "auto"):
            raise
        return None
    return kind.quantizer_device(pick_device(kind, config.device))


def read(config: "EngineConfig") -> "Model":
    """Downloads and reads the model, with progress."""
    from llmrs.model import read_model

    line = StatusLine()
    try:
        return read_model(config, show_progress(line, "downloading", config.model_path))
    finally:
        line.clear()


def output_path(output: str | None, model: "Model", end: str, config: "EngineConfig", force: bool) -> Path:
    """The path to write, by default named like the model and in the current folder. Raises ConfigError."""
    from llmrs.models.files.gguf import part_names
    from llmrs.models.files.output import check_output
    from llmrs.saving import model_name

    path = Path(output or model_name(model.path) + end)
    check_output(path, force=force)
    for file in part_names(model.path.name) if path.is_file() else ():
        check_outputs({"output": str(path)}, {}, str(model.path.with_name(file)))
    if path.is_dir() and model.path.resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"output: {path} holds the model, which would be overwritten", "give another path")
    return path


def print_matrix(m: "Converted") -> None:
    change = f"{m.before} -> {m.after}, error {100 * m.error:.3g} %" if m.before != m.after else f"{m.before}, kept"
    print(one_line(f"{m.done:4} of {m.total}  {m.name:24}  {m.weights:13,}  {change}"), file=sys.stderr)


def summary_lines(path: Path, s: "Summary") -> list[str]:
    from llmrs.memory import format_bytes

    types = ", ".join(f"{name} {100 * count / s.types.total():.3g} %" for name, count in s.types.most_common())
    sizes = {one_line(path.name): s.bytes_after, "before": s.bytes_before}
    lines = [f"{n}: {format_bytes(size)}, {8 * size / s.weights:.2f} bits per weight" for n, size in sizes.items()]
    return [*lines, f"matrices: {types}"]


def samples_of(path: Path, model: "Model") -> "list[Sample]":
    from llmrs.evaluation import read_samples

    return read_samples(path, model)


def compare(original: "Model", path: Path, samples: "list[Sample]", config: "EngineConfig") -> "Evaluation":
    """In float32, with progress."""
    from dataclasses import replace

    from llmrs.evaluation import evaluate
    from llmrs.model import read_folder, read_gguf

    line = StatusLine()
    line.show(lambda: "evaluating")
    try:
        return evaluate(
            original, read_folder(path) if path.is_dir() else read_gguf(path), samples,
            replace(config, dtype="f32", kv_cache_dtype="f32"),
            lambda done, total: line.show(lambda: f"evaluating: {done} of {total} texts"),
        )  # fmt: skip
    finally:
        line.clear()


def evaluation_lines(e: "Evaluation") -> list[str]:
    ratio = 100 * (e.perplexity / e.original_perplexity - 1)
    return [
        f"KL divergence: {e.kl_divergence:.5f} nats per token, on {e.tokens:,} tokens",
        f"same likeliest token: {100 * e.same_top:.2f} %",
        f"perplexity: {e.perplexity:.4f}, before {e.original_perplexity:.4f} ({ratio:+.2f} %)",
    ]
