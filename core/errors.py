"""The error tree. Each error says what was wrong, and `hint` says what would help.

LlmrsError
├── ConfigError           an option, or the file that sets it
├── ModelError            a model folder, its weights, tokenizer or template
│   └── GraphError        a model graph that is not well formed, or that a backend can't run
├── BackendError          a backend or a device that is missing or that failed
│   └── MemoryLimitError  what was asked for does not fit in memory
├── RequestError          one request; nothing else in flight is touched
│   └── ContextLengthError
├── LoadCancelledError    a progress callback stopped the loading of a model
└── EngineClosedError     the engine was closed while, or before, it was used
"""

import difflib
from collections.abc import Iterable


class LlmrsError(Exception):
    """Base of every error that llmrs raises on purpose.

    `message` names the value and what is allowed; `hint` is one line of advice, or empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class ConfigError(LlmrsError, ValueError):
    """An option has a wrong name, type or value, or its file can't be read."""


class ModelError(LlmrsError):
    """A model's folder, weights, tokenizer or chat template can't be used."""


class GraphError(ModelError):
    """A model graph breaks a rule of the IR, or holds an op that a backend has no rule for."""


class BackendError(LlmrsError):
    """A backend or device is not there, or a step failed on it."""


class MemoryLimitError(BackendError):
    """What was asked for needs more memory than there is, or than was allowed."""


class RequestError(LlmrsError, ValueError):
    """One request can't be served as asked."""


class ContextLengthError(RequestError):
    """A prompt leaves no room for an answer within the context."""


class LoadCancelledError(LlmrsError):
    """The caller did not want the model any more."""


class EngineClosedError(LlmrsError):
    """The engine was closed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint: the known words that are closest to `word`, or all of them where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    return "did you mean " + " or ".join(close) + "?" if close else "known are: " + ", ".join(known)
