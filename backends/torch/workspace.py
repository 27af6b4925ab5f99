"""Memory of a GPU that is neither weights nor KV cache: what a step's results take, and what libraries keep."""

from llmrs.core.ir import Function, Graph

LIBRARIES = 400 * 2**20  # workspaces of cuBLAS, code of kernels, recorded graphs


def step_memory(graph: Graph, tokens: int, itemsize: int) -> int:
    """Bytes of a step's results, an upper bound: a layer's values all at once."""
    return tokens * itemsize * max((_elements(f) for f in graph.functions.values()), default=0)


def runner_memory(graph: Graph, sequences: int, step: int, itemsize: int) -> int:
    """Bytes for steps whose results take `step`, and for logits and a float32 copy of them.

    Twice, since recorded graphs keep a pool of their own.
    """
    vocabulary = graph.main.outs[0].type.sizes[0]
    return LIBRARIES + 2 * (step + sequences * vocabulary * (itemsize + 4))


def _elements(function: Function) -> int:
    """Elements for each token of all values that a layer's equations give."""
    found = 0
    for v in (v for e in function.equations for v in e.outs if v.type.dtype == "act"):
        count = 1
        for size in v.type.sizes:
            count *= size
        found += count
    return found
