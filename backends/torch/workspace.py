"""GPU memory that is neither weights nor KV cache: activations of a step, logits, and what libraries keep."""

from math import prod

from llmrs.core.ir import Function, Graph

LIBRARY_BYTES = 400 * 2**20  # cuBLAS workspaces, kernel code, CUDA graphs


def activation_bytes(graph: Graph, num_tokens: int, itemsize: int) -> int:
    """Upper bound of a step's activations: all values of one layer at once."""
    return num_tokens * itemsize * max((_elements_per_token(f) for f in graph.functions.values()), default=0)


def workspace_bytes(graph: Graph, num_seqs: int, activations: int, itemsize: int) -> int:
    """For steps with these bytes of activations, logits, and a float32 copy of the logits.

    Twice, since CUDA graphs have a pool of their own.
    """
    vocab_size = graph.main.outs[0].type.sizes[0]
    return LIBRARY_BYTES + 2 * (activations + num_seqs * vocab_size * (itemsize + 4))


def _elements_per_token(function: Function) -> int:
    outs = (v for e in function.equations for v in e.outs if v.type.dtype == "act")
    return sum(prod(v.type.sizes) for v in outs)
