"""The Torch backend: CPU, and CUDA."""

from llmrs.backends.cores import passive_waiting

with passive_waiting():
    import torch as torch
