"""`EngineConfig`: which model is loaded, where it runs, and how much of it at once."""

import os
import sys
from dataclasses import dataclass

from llmrs.backends.base import DTYPES, BackendOptions
from llmrs.core.options import option
from llmrs.quant.schemes import find_scheme


@dataclass(frozen=True)
class EngineConfig(BackendOptions):
    """Options of an engine. Those of its backend are inherited. Raises ConfigError for a wrong value."""

    model_path: str = option("demo", "bundled model, folder, .gguf file or Hugging Face id",
                             ("model", "w", "m", "weight_path"))  # fmt: skip
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id; null: the main branch")
    offline: bool = option(False, "use only cached files of Hugging Face ids, as HF_HUB_OFFLINE=1 does")
    backend: str = option("auto", "auto, mlx, torch, reference, or the name of an installed third-party backend")
    device: str = option("auto", "auto, cpu, gpu, or one GPU such as cuda:0", ("d", "device_ids"))
    dtype: str = option("bf16", "data type of activations, weights and KV cache", choices=DTYPES)
    kv_cache_dtype: str = option("auto", "data type of the KV cache; auto: that of dtype",
                                 choices=("auto", *DTYPES, "fp8"))  # fmt: skip
    quant: str | None = option(None, "quantize weights at load: q4_0 to q8_0, q2k to q6k, q3_k_m, q4_k_s, q4_k_m, "
                               "q5_k_m, mlx4, mlx8, fp8", ("isq",))  # fmt: skip
    save_quantized: str | None = option(None, "also write the weights of quant here: a .gguf file; for mlx4, mlx8 and "
                                        "fp8 a folder")  # fmt: skip
    max_model_len: int | None = option(None, "maximum tokens of prompt and output; "
                                       "null: the model's limit, at most 4096", low=2, high=2**24)  # fmt: skip
    max_num_seqs: int = option(8 if sys.platform == "darwin" else 32,
                               "maximum concurrent sequences (8 on macOS, else 32)", low=1, high=4096)  # fmt: skip
    max_num_batched_tokens: int | None = option(None, "maximum tokens per step; longer prompts are split into chunks; "
                                                "null: 2048, on a CPU 256", low=1, high=2**20)  # fmt: skip
    block_size: int | None = option(None, "tokens per KV block; null: the backend's default", low=1, high=1024)
    kv_cache_memory: int | None = option(None, "bytes of the KV cache; null: as needed, within free memory", low=1)
    memory_fraction: float = option(0.9, "fraction of free memory that may be used", low=0.01, high=1.0)
    prefix_cache: bool = option(True, "reuse the KV cache of prompts that begin alike")

    def __post_init__(self) -> None:
        for name in ("model_path", "save_quantized"):
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
        super().__post_init__()
        if self.quant is not None:
            find_scheme(self.quant)
