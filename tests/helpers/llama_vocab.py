"""llama.cpp's tokenizers as oracles, through `llama_cpp`. Files may hold a vocabulary alone."""

import ctypes as c
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp

HERE = str(Path(__file__).parent)


def encoded(paths: Sequence[Path], texts: Sequence[str], *, special: bool = False, parse: bool = True) -> dict:
    """File -> the ids of each text, or None for a file that is refused.

    `special`: with bos and eos where the file asks for them; `parse`: control tokens in the text are parsed.
    """
    return _run("encoded", [str(p) for p in paths], list(texts), special, parse)


def pieces(path: Path) -> list[bytes]:
    """What each token adds to a text, control tokens by their names."""
    return [bytes.fromhex(piece) for piece in _run("pieces", str(path))]


def end_tokens(path: Path) -> list[int]:
    """The tokens that end a generation."""
    return _run("end_tokens", str(path))


def _run(*arguments: object) -> object:
    llama_cpp.require_llama_cpp()
    done = subprocess.run([sys.executable, __file__, str(llama_cpp.LIBRARIES)], input=json.dumps(arguments), text=True,
                          capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": HERE})  # fmt: skip
    assert done.returncode == 0, f"llama.cpp: {arguments[0]}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


class _Vocab(llama_cpp.Llama):
    """In its own process."""

    def load(self, path: str) -> bool:
        lib = self.lib
        lib.llama_model_default_params.restype = llama_cpp.ModelParams
        lib.llama_model_load_from_file.argtypes = [c.c_char_p, llama_cpp.ModelParams]
        lib.llama_model_load_from_file.restype = lib.llama_model_get_vocab.restype = c.c_void_p
        lib.llama_model_get_vocab.argtypes = lib.llama_vocab_n_tokens.argtypes = [c.c_void_p]
        lib.llama_tokenize.argtypes = [c.c_void_p, c.c_char_p, c.c_int32, c.c_void_p, c.c_int32,
                                       c.c_bool, c.c_bool]  # fmt: skip
        lib.llama_token_to_piece.argtypes = [c.c_void_p, c.c_int32, c.c_char_p, c.c_int32, c.c_int32, c.c_bool]
        lib.llama_vocab_is_eog.argtypes, lib.llama_vocab_is_eog.restype = [c.c_void_p, c.c_int32], c.c_bool
        params = lib.llama_model_default_params()
        params.flags[0] = True  # the vocabulary alone
        model = lib.llama_model_load_from_file(path.encode(), params)
        self.vocab = lib.llama_model_get_vocab(model) if model else None
        return bool(model)

    def encoded(self, paths: list[str], texts: list[str], special: bool, parse: bool) -> dict[str, object]:
        return {path: [self.ids(t, special, parse) for t in texts] if self.load(path) else None for path in paths}

    def ids(self, text: str, special: bool, parse: bool) -> list[int]:
        raw = text.encode()
        ids = (c.c_int32 * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), special, parse)
        return list(ids[:count])

    def pieces(self, path: str) -> list[str]:
        assert self.load(path)
        buffer = c.create_string_buffer(4096)
        sizes = [(self.lib.llama_token_to_piece(self.vocab, i, buffer, 4096, 0, True), buffer.raw)
                 for i in range(self.lib.llama_vocab_n_tokens(self.vocab))]  # fmt: skip
        return [data[:size].hex() for size, data in sizes]

    def end_tokens(self, path: str) -> list[int]:
        assert self.load(path)
        return [
            i for i in range(self.lib.llama_vocab_n_tokens(self.vocab)) if self.lib.llama_vocab_is_eog(self.vocab, i)
        ]


if __name__ == "__main__":
    name, *arguments = json.load(sys.stdin)
    print(json.dumps(getattr(_Vocab(Path(sys.argv[1])), name)(*arguments)))
