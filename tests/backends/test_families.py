"""Every family against transformers: logits in float32, and greedy tokens, on every backend."""

import copy

import numpy as np
import pytest
import tiny
import torch

BLOCK = 4


def expected_logits(model, sequences):
    """In float64: in float32 transformers itself is up to 7e-5 off."""
    model = copy.deepcopy(model).double()
    model.config._experts_implementation = "eager"  # the others know no float64
    with torch.inference_mode():
        return np.stack([model(torch.tensor([s])).logits[0, -1].numpy() for s in sequences])


def expected_tokens(model, prompt, count):
    tokens = torch.tensor([prompt])
    greedy = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **greedy)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", tiny.CHECKPOINTS)
def test_logits_and_greedy_tokens_equal_transformers(name, checkpoints):
    """On prompts of one token, of a block and one more, of several blocks, and longer than any window."""
    model = checkpoints.model(name)
    sequences = tiny.prompts(1, BLOCK, BLOCK + 1, 23, 64)
    logits = expected_logits(model, sequences)
    assert np.abs(logits).max() > 1  # the comparison means something
    prompts = tiny.prompts(1, 9, 40)
    tokens = [expected_tokens(model, s, 64) for s in prompts]
    for backend_name in tiny.BACKENDS:
        backend, _ = tiny.backend_on(backend_name, checkpoints.folder(name))
        backend.allocate(200, BLOCK, 8, 256)
        ours = backend.to_host(backend.forward(tiny.prefill_batch(sequences, BLOCK)))
        assert np.abs(ours - logits).max() < 1e-4, backend_name
        requests = [tiny.request(s, max_tokens=64) for s in prompts]
        assert tiny.run(tiny.core_on(backend, max_num_batched_tokens=16), requests) == tokens, backend_name


@pytest.mark.parametrize("backend_name", tiny.BACKENDS[1:])
def test_bf16_follows_float32(backend_name, checkpoints):
    """In bf16 logits agree as far as 8 bits of mantissa carry; a wrong dtype somewhere would not."""
    sequences = tiny.prompts(30, 7)
    logits = []
    for dtype in ("f32", "bf16"):
        backend, _ = tiny.backend_on(backend_name, checkpoints.folder("qwen3"), dtype)
        backend.allocate(64, BLOCK, 4, 256)
        logits.append(backend.to_host(backend.forward(tiny.prefill_batch(sequences, BLOCK))))
    error = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm(logits[0])
    assert 0 < error < 0.05
