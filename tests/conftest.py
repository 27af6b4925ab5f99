"""Shared fixtures. Tests are imported by path (importlib mode), so helper modules beside them are put on sys.path."""

import datetime
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [*(str(HERE / part) for part in ("helpers", "tools", "bench")), str(HERE.parent / "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> "Checkpoints":
    """Tiny checkpoints by name, each written once a session, with transformers' model of it."""
    return Checkpoints(tmp_path_factory)


class Checkpoints:
    """`folder(name)` and `model(name)` of tests.tiny.CHECKPOINTS."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory, self.made = factory, {}

    def folder(self, name: str) -> Path:
        return self._made(name)[0]

    def model(self, name: str) -> object:
        return self._made(name)[1]

    def _made(self, name: str) -> tuple[Path, object]:
        if name not in self.made:
            import tiny

            folder = self.factory.mktemp(name)
            self.made[name] = folder, tiny.write_checkpoint(name, folder)
        return self.made[name]


@pytest.fixture
def controllers(monkeypatch):
    """The controller of the Mac app, from the app's folder; every engine that a test makes must have ended with it."""
    from mac_app import APP, engine_threads

    monkeypatch.syspath_prepend(APP)
    import llmrs_chat.controller

    yield llmrs_chat.controller
    assert not engine_threads()


@pytest.fixture
def broken(tmp_path):
    """A model's folder whose weights are cut off."""
    from llmrs.models import demo

    folder = shutil.copytree(demo.FILES, tmp_path / "broken")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return folder


@pytest.fixture
def copied(tmp_path):
    """The bundled model as a folder that a user may open."""
    from llmrs.models import demo

    return shutil.copytree(demo.FILES, tmp_path / "copied")


@pytest.fixture(scope="session")
def folder(checkpoints, tmp_path_factory):
    """A whole model, small and random, that chats. No test changes it."""
    import texts

    return texts.write_model(checkpoints.folder("chat"), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def config(folder):
    """Of an engine on that model, with small blocks and steps."""
    from llmrs import EngineConfig

    return EngineConfig(folder, dtype="f32", device="cpu", block_size=4, max_num_batched_tokens=32)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake Hub and an empty cache."""
    import hub_server
    from huggingface_hub import constants

    from llmrs.models.hub import download

    with hub_server.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(download, "PAUSE", 0.0)
        yield server


@pytest.fixture
def engine(config):
    from llmrs import Engine

    with Engine(config) as engine:
        yield engine


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty folder; exit status, stdout, stderr."""
    from llmrs.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*args):
        status = main([str(a) for a in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def frozen_time(monkeypatch):
    """The same time for our templates and transformers'."""
    from transformers.utils import chat_template_utils

    from llmrs.models.text import sandbox

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 7, 9, 5, tzinfo=tz)

    monkeypatch.setattr(sandbox, "datetime", Then)
    monkeypatch.setattr(chat_template_utils, "datetime", Then)
