"""Triton kernels for NVIDIA GPUs. Each stands beside the op that defines it; see `launch` for what all share."""
