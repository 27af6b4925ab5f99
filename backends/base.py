"""The Backend interface, and how backends are looked up."""

import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

import numpy as np

from llmrs.backends.fusion import fuse_graph
from llmrs.core.batch import Batch
from llmrs.core.engine import AsyncOutput
from llmrs.core.errors import BackendError, ConfigError, GraphError, did_you_mean
from llmrs.core.ir import Graph
from llmrs.core.options import Checked, option
from llmrs.quant.tensor import AnyTensor

GROUP = "llmrs.backends"  # entry points; a third party registers a backend here
DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "fp8": 1}
DTYPES = ("bf16", "f16", "f32")
SCALE_BYTES = 4  # fp8 KV: one float32 scale per head and token


@dataclass(frozen=True)
class KernelEvent:
    """A kernel or copy on the device, or an op on a CPU; times in seconds on the profiler's clock."""

    name: str
    begin: float
    end: float


class Profiler(Protocol):
    """Records what runs on a device. Used by the backend's thread."""

    asynchronous: bool  # the device runs asynchronously to the host and can be idle

    def start(self) -> None:
        """Starts recording."""

    def stop(self) -> list[KernelEvent]:
        """Stops. Returns the events since `start` in order of their begin."""


@dataclass(frozen=True, kw_only=True)
class BackendOptions(Checked):
    """The options that a backend reads itself; `EngineConfig` adds the engine's."""

    threads: int | None = option(None, "CPU threads of a step; null: one per usable core", low=1, high=1024)
    kernels: str = option(
        "auto",
        "kernel set: auto (ours on a GPU), plain (framework ops), triton (Triton kernels on any device)",
        choices=("auto", "plain", "triton"),
    )
    cuda_graphs: bool = option(True, "capture steps as CUDA graphs and replay them (Triton kernels only)")
    memory_limit: int | None = option(None, "bytes of weights and KV cache together; null: free memory", low=1)


class Backend(ABC):
    """Runs a model's graph on a device. Used only by the thread that created it.

    Lifecycle: `__init__`, `load`, `allocate`, any number of `launch`, `close`. `load` rewrites the graph to the
    subclass's `fused_ops`.
    """

    name: str
    fused_ops: frozenset[str] = frozenset()
    max_in_flight = 1  # steps launched before the first one's tokens are read
    kv_dtypes: tuple[str, ...] = DTYPES  # supported KV cache dtypes
    block_size = 16  # default tokens per KV block
    step_tokens = 2048  # default max_num_batched_tokens

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        """`device` is "auto" or one of `devices()`. Raises BackendError if `kv_dtype` is not supported."""
        if kv_dtype not in self.kv_dtypes:
            has = ", ".join(("auto", *self.kv_dtypes))
            raise BackendError(f"kv_cache_dtype: backend {self.name} has no {kv_dtype} on {device}", f"it has: {has}")
        self.device, self.dtype, self.kv_dtype = device, dtype, kv_dtype
        self.graph: Graph

    def configure(self, options: BackendOptions) -> None:
        """Takes the user's options before anything is loaded. Raises BackendError, ConfigError."""
        if options.kernels != "auto":
            raise ConfigError(f"kernels: backend {self.name} has no choice of kernels", "leave it at auto")
        self.refuse_threads(options)

    def refuse_threads(self, options: BackendOptions) -> None:
        """For backends that do not set the number of CPU threads. Raises ConfigError if one is given."""
        if options.threads is not None:
            raise ConfigError(f"threads: backend {self.name} has no choice of threads", "leave it out")

    def workspace_bytes(self, graph: Graph, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """Bytes of activations, logits and library workspaces of a step of this size."""
        return 0

    @classmethod
    @abstractmethod
    def devices(cls) -> list[str]:
        """Usable devices of this machine, best first."""

    @classmethod
    @abstractmethod
    def ops(cls) -> frozenset[str]:
        """Ops with a rule, fused ops included."""

    @property
    def keeps_quantized(self) -> bool:
        """Whether quantized weights stay so in memory; else `load` unpacks them to `dtype`."""
        return False

    @classmethod
    def quantizer_device(cls, device: str) -> str | None:
        """Where weights for this device are quantized: a device of Torch; None: by NumPy."""
        return None

    @abstractmethod
    def free_memory(self) -> int:
        """Free device memory in bytes."""

    def load(self, graph: Graph, weights: Mapping[str, AnyTensor], progress: Callable[[int], None]) -> None:
        """Loads weights by canonical name; `progress` receives the bytes of each.

        Each is read once: reading may quantize it. Raises GraphError for an op without a rule, naming op, backend and
        model.
        """
        self.graph = fuse_graph(graph, self.fused_ops)
        functions = (*self.graph.functions.values(), self.graph.main)
        missing = {e.op for f in functions for e in f.equations} - self.ops() - {"call"}
        if missing:
            raise GraphError(f"backend {self.name} has no rule for {', '.join(sorted(missing))} of {graph.name}")
        self.load_weights(weights, progress)

    @abstractmethod
    def load_weights(self, weights: Mapping[str, AnyTensor], progress: Callable[[int], None]) -> None:
        """Loads the weights of `self.graph`."""

    @abstractmethod
    def allocate(
        self, num_blocks: int, block_size: int, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int = 0
    ) -> None:
        """Allocates the KV cache and the state of each slot, and prepares steps of up to `max_num_batched_tokens`
        tokens: kernels are loaded, graphs captured."""

    def launch(self, batch: Batch) -> AsyncOutput:
        """Starts a step: forward and sample. Asynchronous where the device allows it."""
        return self.sample(self.forward(batch), batch)

    @abstractmethod
    def forward(self, batch: Batch) -> Any:
        """Starts the model: device logits float32 (R, V) of the rows `batch.logits_indices`."""

    @abstractmethod
    def sample(self, logits: Any, batch: Batch, mask: np.ndarray | None = None) -> AsyncOutput:
        """Starts sampling (defined in `llmrs.core.sampling`) and keeps the tokens on the device for the next step.

        `mask`: allowed tokens as bits, uint32 (S, ceil(V / 32)), lowest bit of a word first.
        """

    def idle(self) -> bool:
        """Called while no request runs, for a few milliseconds of background work. True: more work is left."""
        return False

    @abstractmethod
    def to_host(self, logits: Any) -> np.ndarray:
        """Device logits as float32 (R, V). For tests."""

    @abstractmethod
    def to_device(self, logits: np.ndarray) -> Any:
        """Inverse of `to_host`. For tests."""

    def measure_peak(self) -> tuple[float, float]:
        """Measured peak memory read bandwidth (bytes/s) and compute in `dtype` (FLOP/s)."""
        data, matrix = np.ones(2**26, np.float32), np.ones((768, 768), np.float32)
        reading = bench(lambda: data.sum(), lambda: None)
        return data.nbytes / reading, 2 * 768**3 / bench(lambda: matrix @ matrix, lambda: None)

    def profiler(self) -> Profiler | None:
        """A kernel profiler; None: not supported."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Frees the memory. Idempotent."""


def bench(start: Callable[[], Any], wait: Callable[[], None], rounds: int = 6, together: int = 1) -> float:
    """Best-of-`rounds` time in seconds after one warm-up. `wait` blocks until an asynchronous `start` is done;
    `together` starts share one wait."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(together):
            start()
        wait()
        times.append((time.perf_counter() - begin) / together)
    return min(times[1:])


def names() -> list[str]:
    """Registered backends."""
    return sorted(e.name for e in entry_points(group=GROUP))


def resolve(name: str) -> str:
    """Resolves "auto": mlx on Apple silicon, torch elsewhere."""
    if name != "auto":
        return name
    apple = sys.platform == "darwin" and platform.machine() == "arm64" and "mlx" in names()
    return "mlx" if apple else "torch"


def load_backend(name: str) -> type[Backend]:
    """Class of a registered backend. Raises BackendError if it is unknown or cannot be imported."""
    entries = list(entry_points(group=GROUP, name=name))
    if not entries:
        raise BackendError(f"backend {name!r} is not registered", did_you_mean(name, ("auto", *names())))
    try:
        backend = entries[0].load()
    except ImportError as error:
        raise BackendError(f"backend {name!r} can't be loaded: {error}", f"pip install 'llmrs[{name}]'") from error
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise BackendError(f"backend {name!r}: {entries[0].value} is not a Backend class", "see llmrs.backends.base")
    return backend


def pick_device(backend: type[Backend], device: str) -> str:
    """Resolves a device option: "auto" is the best device, "gpu" the best that is not a CPU."""
    devices = backend.devices()
    wanted = [d for d in devices if d != "cpu"] if device == "gpu" else devices
    if device in ("auto", "gpu") and wanted:
        return wanted[0]
    numbered = f"cuda:{device}" if device.isdigit() else f"{device}:0"  # accepts "0" and "cuda"
    for candidate in (device, numbered):
        if candidate in devices:
            return candidate
    raise BackendError(f"device {device!r} is not available", f"backend {backend.name} has: {', '.join(devices)}")
