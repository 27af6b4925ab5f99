"""Quantized matrices for the Triton kernels: random blocks of the real formats, and other forms."""

import numpy as np

from llmrs.backends.testing import FORMS
from llmrs.quant import ggml
from llmrs.quant.tensor import QuantTensor, of_planes
from llmrs.random_model import random_quantized

GGUF = [t.name for t in ggml.GGML_TYPES.values() if t.format]
OTHERS = [(form, planes) for forms in FORMS for form, planes in forms]


def random_gguf(name: str, n: int, k: int, seed: int = 0) -> QuantTensor:
    """Any bytes, but f16 scales of about 0.01 of either sign; those of the first row are 0."""
    rng, kind = np.random.default_rng(seed), ggml.TYPES[name]
    blocks = rng.integers(0, 256, (n, kind.nbytes((k,))), np.uint8)
    tensor = ggml.tensor(kind, (n, k), blocks.reshape(-1))
    assert isinstance(tensor, QuantTensor)
    planes = tensor.planes()
    for plane in ("scales", "biases", "super_scales", "super_mins"):
        if plane in planes and planes[plane].dtype == np.float16:
            planes[plane] = (planes[plane].view(np.uint16) & 0x83FF | 0x2000).view(np.float16)
    planes["scales"][0] = 0
    if tensor.form.scale == "half_e8m0":
        planes["scales"] = rng.integers(110, 125, planes["scales"].shape, np.uint8)
    return of_planes(name, tensor.form, planes)


def cases() -> list[QuantTensor]:
    rng = np.random.default_rng(0)
    made = [random_gguf(name, 11, 256) for name in GGUF]
    return [*made, *(random_quantized(rng, form, more, (11, 256)) for form, more in OTHERS)]
