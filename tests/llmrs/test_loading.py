"""Peak memory and progress of loading."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import save_file

from llmrs.backends.torch.backend import zeros
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.arch.layers import LAYER
from llmrs.models.files.weights import num_parameters, stored_name

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 4000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LARGEST = 2 * 3072 * 1024  # elements: gate and up, merged
SLACK = 16_000_000  # bytes of allocator fragmentation: 4 to 6 million here; a tensor has 12.6
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import tiny
from llmrs.models.arch.families import family, graph_of, read_config
from llmrs.models.files.safetensors import SafetensorsSource
from llmrs.models.files.weights import Weights

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

folder, dtype = Path(sys.argv[1]), sys.argv[2]
config = read_config(folder)
graph = graph_of(config)
backend = tiny.empty_backend(sys.argv[4], dtype)
weights = Weights(graph, family(config.architecture).names, SafetensorsSource(folder), tied=config.tie_word_embeddings)
if sys.argv[4] == "torch":
    import torch
    from llmrs.backends.torch.cpu_linear import measured
    measured({"bf16": torch.bfloat16, "f32": torch.float32}[dtype], torch.get_num_threads())  # once per process
before, seen, done = anonymous(), [], []
backend.load(graph, weights, lambda count: (seen.append(anonymous() - before), done.append(count)))
print(json.dumps({"peak": max(seen), "end": anonymous() - before, "done": sum(done)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """About 50 million weights in float32, without transformers."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = read_config(folder)
    names = family(config.architecture).names
    rng = np.random.default_rng(0)
    tensors = {
        stored_name(s.tensor, names): rng.standard_normal((s.rows, *w.columns), np.float32)
        for w in graph_of(config).weights()
        for s in w.segments
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("f32", 4)])
@pytest.mark.parametrize("backend", [b for b in tiny.BACKENDS if b in ("torch", "mlx")])
def test_peak_memory_is_the_weights_and_two_tensors(folder, backend, dtype, size):
    command = [sys.executable, "-c", SCRIPT, str(folder), dtype, str(Path(tiny.__file__).parent), backend]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    count = num_parameters(graph_of(read_config(folder)))
    assert found["peak"] <= size * (count + 2 * LARGEST) + SLACK
    assert found["end"] <= size * count + SLACK
    assert found["done"] == 4 * count  # progress counts bytes of the file


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kv_cache_is_zeros_that_take_memory_only_when_they_are_touched():
    before = anonymous()
    pool = zeros((1024, 16, 128, 64), torch.bfloat16, torch.device("cpu"))  # 256 MiB
    assert anonymous() - before < pool.nbytes / 8
    assert pool.shape == (1024, 16, 128, 64)
    assert not pool[::128].any()
    pool += 1
    assert anonymous() - before >= 0.9 * pool.nbytes


def test_canonical_names_become_those_of_the_file():
    names = {f"{LAYER}q": "model.layers.{i}.q", f"{LAYER}experts.{{e}}.up": "m.{i}.e.{e}.up", "lm_head": "lm_head"}
    assert stored_name("layers.12.q", names) == "model.layers.12.q"
    assert stored_name("layers.3.experts.3.up", names) == "m.3.e.3.up"
    assert stored_name("lm_head", names) == "lm_head"
