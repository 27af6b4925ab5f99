"""llama.cpp as an oracle, by ctypes: its quantizer, its greedy tokens and its logits.

The libraries are those that node-llama-cpp 3.21.1 brings prebuilt (llama.cpp 0.4.0; `npm i -E node-llama-cpp@3.21.1
--ignore-scripts`), looked for in $NODE_LLAMA_MODULES, else in ./node_modules. The structs are those of its llama.h.
A call that fails there ends the process: each runs in its own.
"""

import ctypes as c
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MODULES = Path(os.environ.get("NODE_LLAMA_MODULES", "node_modules"))
LIBRARIES = MODULES / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30,
    "bf16": 32,
}  # fmt: skip


def require_llama_cpp() -> None:
    """Skips a test by name where the libraries are missing."""
    import pytest  # not above: each call to llama.cpp starts a process of this module

    if not LIBRARIES.is_dir():
        pytest.skip("node-llama-cpp is missing: npm i -E node-llama-cpp@3.21.1 --ignore-scripts, NODE_LLAMA_MODULES")


def quantize(source: Path, targets: Mapping[Path, str]) -> None:
    """Quantizes a GGUF file to each of `targets`, whose values are in TYPES."""
    _call("quantize", str(source), {str(path): TYPES[kind] for path, kind in targets.items()})


def quantize_matrix(x: "np.ndarray", number: int, importance: "np.ndarray | None" = None) -> "np.ndarray":
    """Blocks, one-dimensional uint8, of float32 (N, K) in the type of this number, by ggml itself, in this process."""
    import numpy as np

    require_llama_cpp()
    lib = c.CDLL(str(LIBRARIES / "libggml-base.so"))
    lib.ggml_quantize_chunk.argtypes = [_i, _p, _p, c.c_int64, c.c_int64, c.c_int64, _p]
    lib.ggml_quantize_chunk.restype = c.c_size_t
    x, blocks = np.ascontiguousarray(x, np.float32), np.zeros(x.nbytes, np.uint8)  # larger than needed
    row = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if row is None else row.ctypes.data
    size = lib.ggml_quantize_chunk(number, x.ctypes.data, blocks.ctypes.data, 0, len(x), x.shape[1], pointer)
    return blocks[:size]


def greedy(path: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy tokens after each prompt, with a KV cache in float32."""
    return _call("greedy", str(path), [list(p) for p in prompts], count)


def logits(path: Path, tokens: Sequence[int]) -> list[list[float]]:
    """Logits after each token."""
    return _call("logits", str(path), list(tokens))


def tokenize(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids, with control tokens parsed and without BOS."""
    return _call("tokenize", str(path), list(texts))


def _call(*arguments: object) -> object:
    require_llama_cpp()
    done = subprocess.run([sys.executable, __file__, str(LIBRARIES)], input=json.dumps(arguments), text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, f"llama.cpp: {arguments[0]} of {arguments[1]}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def _struct(*fields: tuple[str, object]) -> type[c.Structure]:
    return type("Struct", (c.Structure,), {"_fields_": list(fields)})


_i, _u, _f, _b, _p, _size = c.c_int32, c.c_uint32, c.c_float, c.c_bool, c.c_void_p, c.c_size_t
ModelParams = _struct(
    ("devices", _p), ("buffers", _p), ("n_gpu_layers", _i), ("modes", _i * 4), ("split", _p), ("progress", _p),
    ("progress_data", _p), ("overrides", _p), ("flags", _b * 6),
)  # fmt: skip
ContextParams = _struct(
    *((n, _u) for n in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_seq")),
    ("n_threads", _i), ("n_threads_batch", _i), ("context", _i), ("rope", _i), ("pooling", _i), ("attention", _i),
    ("flash", _i), ("floats", _f * 6), ("yarn_context", _u), ("callback", _p), ("callback_data", _p), ("type_k", _i),
    ("type_v", _i), ("abort", _p), ("abort_data", _p), ("flags", _b * 6), ("samplers", _p), ("n_samplers", _size),
    ("other", _p),
)  # fmt: skip
QuantizeParams = _struct(
    ("threads", _i), ("ftype", _i), ("output_type", _i), ("embedding_type", _i), ("flags", _b * 6), ("imatrix", _p),
    ("overrides", _p), ("types", _p), ("prune", _p), ("buffer", _size),
)  # fmt: skip
Batch = _struct(
    ("n", _i), ("token", c.POINTER(_i)), ("embd", _p), ("pos", c.POINTER(_i)), ("n_seq", c.POINTER(_i)),
    ("seq", c.POINTER(c.POINTER(_i))), ("logits", c.POINTER(c.c_int8)),
)  # fmt: skip


class Llama:
    """In its own process."""

    def __init__(self, folder: Path) -> None:
        ggml = next(p for p in folder.glob("libggml.*so") if "base" not in p.name)
        self.ggml = c.CDLL(str(ggml), c.RTLD_GLOBAL)
        self.lib = c.CDLL(str(next(folder.glob("libllama.*so"))), c.RTLD_GLOBAL)
        self.ggml.ggml_backend_load_all_from_path.argtypes = [c.c_char_p]
        self.ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.lib.llama_version.restype = c.c_char_p
        assert self.lib.llama_version().startswith(b"0.4.0"), "the structs are those of llama.cpp 0.4.0"
        self.log = c.CFUNCTYPE(None, _i, c.c_char_p, _p)(
            lambda level, text, _: sys.stderr.write(text.decode(errors="replace")) if level >= 3 else None
        )
        self.lib.llama_log_set(self.log, None)

    def quantize(self, source: str, targets: dict[str, int]) -> None:
        f = self.lib.llama_model_quantize_default_params
        f.restype = QuantizeParams
        self.lib.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(QuantizeParams)]
        for target, ftype in targets.items():
            params = f()
            params.threads, params.ftype = 1, ftype
            params.flags[0] = True  # allow_requantize: a quantized file may be expanded
            assert not self.lib.llama_model_quantize(source.encode(), target.encode(), c.byref(params)), target

    def load(self, path: str) -> None:
        lib = self.lib
        lib.llama_model_default_params.restype, lib.llama_context_default_params.restype = ModelParams, ContextParams
        lib.llama_model_load_from_file.argtypes, lib.llama_model_load_from_file.restype = [c.c_char_p, ModelParams], _p
        lib.llama_init_from_model.argtypes, lib.llama_init_from_model.restype = [_p, ContextParams], _p
        lib.llama_model_get_vocab.argtypes, lib.llama_model_get_vocab.restype = [_p], _p
        lib.llama_vocab_n_tokens.argtypes = [_p]
        lib.llama_batch_init.argtypes, lib.llama_batch_init.restype = [_i] * 3, Batch
        lib.llama_decode.argtypes = [_p, Batch]
        lib.llama_get_logits_ith.argtypes, lib.llama_get_logits_ith.restype = [_p, _i], c.POINTER(_f)
        lib.llama_tokenize.argtypes = [_p, c.c_char_p, _i, _p, _i, _b, _b]
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        assert self.model, "not loaded"
        self.vocab = lib.llama_model_get_vocab(self.model)

    def start(self, tokens: int, threads: int = 1, *, exact: bool = True) -> None:
        """`exact`: a KV cache in float32; else its defaults."""
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = -(-tokens // 256) * 256, 2048, 512, 1
        params.n_outputs_seq, params.n_threads, params.n_threads_batch = 0, threads, threads
        if exact:
            params.flash, params.type_k, params.type_v = 0, 0, 0
        self.context = self.lib.llama_init_from_model(self.model, params)
        assert self.context, "no context"
        self.batch = self.lib.llama_batch_init(2048, 0, 1)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def step(self, tokens: Sequence[int], position: int, *, last: bool = False) -> None:
        """Logits of every token, or of the last one only."""
        self.batch.n = len(tokens)
        for n, token in enumerate(tokens):
            wanted = not last or n == len(tokens) - 1
            self.batch.token[n], self.batch.pos[n], self.batch.logits[n] = token, position + n, wanted
            self.batch.n_seq[n], self.batch.seq[n][0] = 1, 0
        assert not self.lib.llama_decode(self.context, self.batch)

    def row(self, n: int) -> list[float]:
        return self.lib.llama_get_logits_ith(self.context, n)[: self.size]

    def logits(self, path: str, tokens: list[int]) -> list[list[float]]:
        self.load(path)
        self.start(len(tokens))
        self.step(tokens, 0)
        return [self.row(n) for n in range(len(tokens))]

    def greedy(self, path: str, prompts: list[list[int]], count: int) -> list[list[int]]:
        self.load(path)
        found = []
        for prompt in prompts:
            self.start(len(prompt) + count)
            out: list[int] = []
            step = prompt
            while len(out) < count:
                self.step(step, len(prompt) + len(out) - len(step) if out else 0)
                row = self.row(len(step) - 1)
                out.append(row.index(max(row)))
                step = out[-1:]
            found.append(out)
        return found

    def tokenize(self, path: str, texts: list[str]) -> list[list[int]]:
        self.load(path)
        found = []
        for text in texts:
            raw = text.encode()
            ids = (_i * (len(raw) + 16))()
            count = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), False, True)
            found.append(list(ids[:count]))
        return found


if __name__ == "__main__":
    name, *arguments = json.load(sys.stdin)
    print(json.dumps(getattr(Llama(Path(sys.argv[1])), name)(*arguments)))
