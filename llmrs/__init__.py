"""llmrs: a small, fast inference engine for language models.

from llmrs import Engine, EngineConfig, SamplingParams

with Engine(EngineConfig("demo")) as engine:
    print(engine.generate_sync([SamplingParams(max_tokens=32)], ["llmrs is"])[0].text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmrs.config import EngineConfig
from llmrs.core.errors import (
    BackendError,
    ConfigError,
    ContextLengthError,
    EngineClosedError,
    GraphError,
    LlmrsError,
    LoadCancelledError,
    MemoryLimitError,
    ModelError,
    RequestError,
)
from llmrs.core.options import SamplingParams
from llmrs.models.text.message import Message
from llmrs.output import GenerationOutput, TokenLogprob

if TYPE_CHECKING:
    from llmrs.aio import AsyncStream
    from llmrs.engine import Engine
    from llmrs.models.text.template import ChatPrompt
    from llmrs.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "AsyncStream", "BackendError", "ChatPrompt", "ConfigError", "ContextLengthError", "Engine", "EngineClosedError",
    "EngineConfig", "GenerationOutput", "GraphError", "LlmrsError", "LoadCancelledError", "MemoryLimitError", "Message",
    "ModelError", "RequestError", "SamplingParams", "Stream", "TokenLogprob",
]  # fmt: skip

_LAZY = {
    "AsyncStream": "llmrs.aio", "ChatPrompt": "llmrs.models.text.template", "Engine": "llmrs.engine",
    "Stream": "llmrs.stream",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports the engine on first use, so that `import llmrs` and `import llmrs.core` stay light."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llmrs' has no attribute {name!r}")
