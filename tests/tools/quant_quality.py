"""What each quantization costs: python tests/tools/quant_quality.py [CONVERSATIONS [FILE]]

Quantizes the bundled model to each type and runs both on held-out conversations in float32. Prints a table, which takes
the place of that in FILE, such as docs/quantization.md. KL divergence is that of the next token over all tokens; the
perplexity is of the answers, since what users say was not trained and is hard to predict at any precision.
"""

import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from demo_model.corpus import END, START, held_out_conversations, render
from demo_model.packing import answer_mask

from llmrs import EngineConfig
from llmrs.conversion import Summary, quantize_model
from llmrs.evaluation import LONGEST, Evaluation, Sample, evaluate
from llmrs.imatrix import measure, read_importance
from llmrs.model import Model, read_folder, read_gguf, read_model
from llmrs.models.files.imatrix import write_imatrix
from llmrs.quant.schemes import SCHEMES, find_scheme

CONFIG = EngineConfig(backend="torch", device="cpu", dtype="f32")
MARK = "<!-- quality -->"
WEIGHTED = ("q2_k", "q4_k_m")  # also with an importance matrix
MEASURED = 200  # other conversations, on which that is measured
HEADINGS = (
    "type",
    "bits per weight",
    "KL divergence",
    "same likeliest token",
    "KL divergence, answers",
    "perplexity, answers",
)


def samples(model: Model, count: int) -> tuple[list[Sample], list[Sample]]:
    """Held-out conversations, scored everywhere, and in the answers."""
    encode = model.tokenizer.encode
    texts = [encode(render(c))[:LONGEST] for c in held_out_conversations(count)]
    header, (end,) = encode(f"{START}assistant\n"), encode(END)
    everywhere = [Sample(t, np.arange(1, len(t))) for t in texts]
    answers = [Sample(t, np.flatnonzero(answer_mask(np.array(t), header, end)[1:]) + 1) for t in texts]
    return everywhere, [s for s in answers if len(s.places)]


def rows(model: Model, count: int, folder: Path) -> Iterator[tuple[str, ...]]:
    """Of each type, from few bits to many."""
    everywhere, answers = samples(model, count)
    importance = folder / "imatrix.gguf"
    tokens = [t for c in held_out_conversations(count + MEASURED)[count:] for t in model.tokenizer.encode(render(c))]
    write_imatrix(importance, measure(model.graph, model.open_weights(), tokens, 512), "conversations", 1, 512)
    found: list[tuple[float, tuple[str, ...]]] = []
    for name, weighted in [*((s, False) for s in SCHEMES), *((s, True) for s in WEIGHTED)]:
        scheme, path = find_scheme(name), folder / (f"{name}.gguf" if find_scheme(name).is_gguf else name)
        given = read_importance(importance, model.graph) if weighted else None
        summary = quantize_model(model, scheme, path, importance=given, force=True)
        quantized = read_gguf(path) if scheme.is_gguf else read_folder(path)
        results = [evaluate(model, quantized, s, CONFIG) for s in (everywhere, answers)]
        found.append((bits(summary), row(name + (", importance matrix" if weighted else ""), summary, *results)))
        print(*found[-1][1], sep="  ", file=sys.stderr, flush=True)
    yield from (cells for _, cells in sorted(found))


def bits(s: Summary) -> float:
    return 8 * s.bytes_after / s.weights


def row(name: str, s: Summary, everywhere: Evaluation, answers: Evaluation) -> tuple[str, ...]:
    more = 100 * (answers.perplexity / answers.original_perplexity - 1)
    return (
        name, f"{bits(s):.2f}", f"{everywhere.kl_divergence:.5f}", f"{100 * everywhere.same_top:.2f} %",
        f"{answers.kl_divergence:.5f}", f"{answers.perplexity:.5f} ({more:+.3f} %)",
    )  # fmt: skip


def main() -> None:
    count, page = int((*sys.argv[1:], "200")[0]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
    warnings.simplefilter("ignore")
    model = read_model(EngineConfig())
    with tempfile.TemporaryDirectory() as folder:
        lines = [HEADINGS, ("---",) * len(HEADINGS), *rows(model, count, Path(folder))]
    table = "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
    print(table)
    if page is not None:
        text = page.read_text("utf-8")
        page.write_text(re.sub(re.escape(MARK) + r"\n(\|.*\n)*", lambda _: f"{MARK}\n{table}", text), "utf-8")


if __name__ == "__main__":
    main()
