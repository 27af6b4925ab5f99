"""The Torch backend: CPU, and CUDA."""
