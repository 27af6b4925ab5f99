"""What a backend is, and how one is found and chosen."""

import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np

from llmrs.backends.fusion import fuse
from llmrs.core.batch import Batch
from llmrs.core.config import DTYPES, EngineConfig
from llmrs.core.engine import Ticket
from llmrs.core.errors import BackendError, ConfigError, GraphError, did_you_mean
from llmrs.core.ir import Graph
from llmrs.quant.tensor import Tensor

GROUP = "llmrs.backends"  # entry points; a third party registers a backend here
DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "fp8": 1}
SCALE_BYTES = 4  # of fp8, for each head of each token, beside its elements


@dataclass(frozen=True)
class KernelEvent:
    """A kernel or a copy that ran on the device, or an op of a CPU; seconds of the profiler's own clock."""

    name: str
    begin: float
    end: float


class Profiler(Protocol):
    """Records what runs on a device. Used by the backend's thread."""

    asynchronous: bool  # whether the device runs beside the host, so that it may be idle while the host works

    def start(self) -> None:
        """Records from now on."""

    def stop(self) -> list[KernelEvent]:
        """What ran since, in the order in which it began."""


class Backend(ABC):
    """Runs a model's graph on a device. Used by one thread: the one that makes it.

    Life: `__init__`, `load`, `allocate`, any number of `launch`, `close`. Subclasses list the fused ops that they
    have rules for; `load` gives them a graph rewritten to those.
    """

    name: str
    fused_ops: frozenset[str] = frozenset()
    max_in_flight = 1  # steps that may be launched before the first one's tokens are read
    kv_dtypes: tuple[str, ...] = DTYPES  # that the KV cache may have
    block_size = 16  # tokens of a KV block, where the user does not say
    step_tokens = 2048  # of a step, where the user does not say

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        """`device` is "auto" or one of `devices()`. Raises BackendError when it, or `kv_dtype`, is not there."""
        if kv_dtype not in self.kv_dtypes:
            has = ", ".join(("auto", *self.kv_dtypes))
            raise BackendError(f"kv_cache_dtype: backend {self.name} has no {kv_dtype} on {device}", f"it has: {has}")
        self.device, self.dtype, self.kv_dtype = device, dtype, kv_dtype
        self.graph: Graph

    def configure(self, config: EngineConfig) -> None:
        """Takes what the user says about how it runs, before anything is loaded. Raises BackendError, ConfigError."""
        for name in ("kernels", "attention"):
            if getattr(config, name) != "auto":
                raise ConfigError(f"{name}: backend {self.name} has no choice of {name}", "leave it at auto")
        self.refuse_threads(config)
        if config.tune:
            raise ConfigError(f"tune: backend {self.name} has nothing to tune", "leave it out")

    def refuse_threads(self, config: EngineConfig) -> None:
        """For backends that do not set the number of CPU threads. Raises ConfigError where one is asked for."""
        if config.threads is not None:
            raise ConfigError(f"threads: backend {self.name} has no choice of threads", "leave it out")

    def reserve(self, graph: Graph, sequences: int, tokens: int) -> int:
        """Bytes that it needs beside weights and KV cache for steps of at most so many sequences and tokens."""
        return 0

    @classmethod
    @abstractmethod
    def devices(cls) -> list[str]:
        """The devices of this machine that the backend can use, the best first."""

    @classmethod
    @abstractmethod
    def ops(cls) -> frozenset[str]:
        """The ops, fused ones included, that it has a rule for."""

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that could still be allocated on the device."""

    def load(self, graph: Graph, weights: Mapping[str, Tensor], progress: Callable[[int], None]) -> None:
        """Takes in the weights, by canonical name; `progress` is given the bytes of each as it is taken.

        Raises GraphError, which names op, backend and model, when the graph has an op without a rule.
        """
        self.graph = fuse(graph, self.fused_ops)
        functions = (*self.graph.functions.values(), self.graph.main)
        missing = {e.op for f in functions for e in f.equations} - self.ops() - {"call"}
        if missing:
            raise GraphError(f"backend {self.name} has no rule for {', '.join(sorted(missing))} of {graph.name}")
        self.load_weights(weights, progress)

    @abstractmethod
    def load_weights(self, weights: Mapping[str, Tensor], progress: Callable[[int], None]) -> None:
        """Takes in the weights of `self.graph`."""

    @abstractmethod
    def allocate(self, blocks: int, block_size: int, slots: int, max_tokens: int) -> None:
        """Makes the KV cache and the state of each slot, whose sequences have at most `max_tokens` tokens."""

    def launch(self, batch: Batch) -> Ticket:
        """Starts a step, forward and sample, and returns at once where the device allows it."""
        return self.sample(self.forward(batch), batch)

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """Starts the first part of a step: logits float32 (R, V) of `batch.rows`, as the device holds them."""

    @abstractmethod
    def sample(self, logits: Any, batch: Batch, mask: np.ndarray | None = None) -> Ticket:
        """Starts the second part, as `llmrs.core.sampling` defines it, and keeps the tokens for the next step.

        `mask` are the tokens that may be sampled, bits uint32 (S, ceil(V / 32)), the lowest bit of a word first.
        """

    def idle(self) -> bool:
        """Called while no request runs: may do some milliseconds of work that make later steps faster. True: there is
        more of it."""
        return False

    @abstractmethod
    def to_host(self, logits: Any) -> np.ndarray:
        """What `forward` gives, as float32 (R, V). For tests."""

    @abstractmethod
    def to_device(self, logits: np.ndarray) -> Any:
        """What `forward` would give. For tests."""

    def measure_peak(self) -> tuple[float, float]:
        """Bytes that the device reads in a second, and operations that it does in `dtype`, measured now."""
        data, matrix = np.ones(2**26, np.float32), np.ones((768, 768), np.float32)
        reading = bench(lambda: data.sum(), lambda: None)
        return data.nbytes / reading, 2 * 768**3 / bench(lambda: matrix @ matrix, lambda: None)

    def profiler(self) -> Profiler | None:
        """What tells when which kernel ran; None: that can't be measured here."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Gives the memory back. A second call does nothing."""


def bench(start: Callable[[], Any], wait: Callable[[], None], rounds: int = 6, together: int = 1) -> float:
    """Seconds of the fastest of some runs, the first not counted. `start` may return before the device is done; then
    `together` starts share one wait, which takes its time too."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(together):
            start()
        wait()
        times.append((time.perf_counter() - begin) / together)
    return min(times[1:])


def names() -> list[str]:
    """The registered backends."""
    return sorted(e.name for e in entry_points(group=GROUP))


def resolve(name: str) -> str:
    """The name itself, or for "auto" MLX on Apple silicon and Torch elsewhere."""
    if name != "auto":
        return name
    apple = sys.platform == "darwin" and platform.machine() == "arm64" and "mlx" in names()
    return "mlx" if apple else "torch"


def load_backend(name: str) -> type[Backend]:
    """The class of a backend. Raises BackendError that says what is there or what to install."""
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise BackendError(f"backend {name!r} is not there", did_you_mean(name, ("auto", *names())))
    try:
        backend = found[0].load()
    except ImportError as error:
        raise BackendError(f"backend {name!r} can't be loaded: {error}", f"pip install 'llmrs[{name}]'") from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendError(f"backend {name!r}: {found[0].value} is not a Backend class", "see llmrs.backends.base")
    return backend


def pick_device(backend: type[Backend], device: str) -> str:
    """The device that the user's word stands for: "auto" and "gpu" mean the best one (that is no CPU)."""
    devices = backend.devices()
    wanted = [d for d in devices if d != "cpu"] if device == "gpu" else devices
    if device in ("auto", "gpu") and wanted:
        return wanted[0]
    numbered = f"cuda:{device}" if device.isdigit() else f"{device}:0"  # "0" and "cuda" are what people write
    for candidate in (device, numbered):
        if candidate in devices:
            return candidate
    raise BackendError(f"device {device!r} is not there", f"backend {backend.name} has: {', '.join(devices)}")
