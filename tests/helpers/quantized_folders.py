"""Folders with one quantized module, written and read; and what config.json may say of them."""

import copy
import json
from functools import cache

import numpy as np
import pytest
import quantized_files as files
from safetensors.torch import save_file

from llmrs.core.errors import ModelError
from llmrs.models.files.quantized import open_weights

W = np.random.default_rng(0).normal(size=(32, 128)).astype(np.float32)


def open_folder(folder, tensors, config):
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return open_weights(folder)


@cache
def packed(name):
    return files.FILES[name][0](W)[0]


def module(name, path="m.q_proj"):
    """The tensors of one module, and the config."""
    return {f"{path}.{part}": t for part, t in packed(name).items()}, files.FILES[name][1]


def read_all(folder, tensors, config):
    source = open_folder(folder, tensors, config)
    return {n: (source.shape(n), source.tensor(n)) for n in source.names()}


def wrong(folder, tensors, config, *words):
    with pytest.raises(ModelError) as caught:
        read_all(folder, tensors, config)
    for word in words:
        assert word in caught.value.message
    assert caught.value.hint


def read_or_refused(folder, tensors, config):
    """What was read, with values of the right shape; {} where it is refused."""
    try:
        found = read_all(folder, tensors, config)
    except ModelError as error:
        return {} if error.message and error.hint else pytest.fail("no hint")
    for shape, tensor in found.values():
        assert tensor.shape == shape
        assert tensor.float32().shape == shape
    return found


def ct(**weights):
    return files.ct(
        "pack-quantized", **{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    )


def targets(*names):
    config = copy.deepcopy(ct())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = list(names)
    return config


def hf(method, **fields):
    return {"quantization_config": {"quant_method": method, **fields}}
