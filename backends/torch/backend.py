"""Lowers a model's graph to a list of torch calls and runs it step by step, on the CPU or an NVIDIA GPU."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from llmrs.backends.base import Backend, best_time
from llmrs.backends.memory import free_host_memory, keep_freed_memory, trim_host_memory, use_huge_pages
from llmrs.backends.torch import ops
from llmrs.backends.torch.attention import Context, context, on_device
from llmrs.backends.torch.linear import prepare
from llmrs.backends.torch.sampling import SlotState, logprobs, sample
from llmrs.core.batch import Batch
from llmrs.core.errors import MemoryLimitError
from llmrs.core.ir import Equation, Function, Value, Weight, at_layer
from llmrs.core.sampling import Logprobs
from llmrs.quant.tensor import Tensor

LARGE = 2**28  # bytes of weights from which huge pages pay
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


class TorchTicket:
    """A step whose tokens, and log probabilities where asked for, are on their way to the host."""

    def __init__(self, tokens: torch.Tensor, likely: tuple[torch.Tensor, ...] | None) -> None:
        self.host = [_on_host(t) for t in (tokens, *(likely or ()))]
        self.event = None
        if tokens.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def tokens(self) -> np.ndarray:
        if self.event is not None:
            self.event.synchronize()
        return self.host[0].numpy().astype(np.int32)

    def logprobs(self) -> Logprobs | None:
        if len(self.host) == 1:
            return None
        chosen, ids, top = (t.numpy() for t in self.host[1:])
        return Logprobs(chosen, ids.astype(np.int32), top)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that will be there when the device has come so far; a CPU tensor as it is."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class Call:
    """One lowered equation: results at `outs` from the values at `inputs`. Values are numbered within a program."""

    run: Callable[..., Any]
    inputs: list[int]
    outs: list[int]
    dead: tuple[int, ...] = ()  # values that no later call reads


class TorchBackend(Backend):
    """Plain torch ops. On the CPU weights are packed for oneDNN; tied embeddings are read from the mapped file."""

    name = "torch"
    fused_ops = ops.FUSED

    def __init__(self, device: str, dtype: str, kv_dtype: str) -> None:
        super().__init__(device, dtype, kv_dtype)
        self.at = torch.device(device)
        self.type = DTYPES[dtype]
        if self.at.type == "cuda":
            self.max_in_flight = 2  # on the CPU a launch computes
        else:
            keep_freed_memory()
            self.step_tokens = 256  # as fast as more, with temporaries that the caches hold; and nobody waits long
        self.program: list[Call] = []
        self.kv: list[ops.KV] = []
        self.slots = SlotState(0, 0, self.at)

    @classmethod
    def devices(cls) -> list[str]:
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] + ["cpu"]

    @classmethod
    def ops(cls) -> frozenset[str]:
        return frozenset(ops.OPS)

    def free_memory(self) -> int:
        return torch.cuda.mem_get_info(self.at)[0] if self.at.type == "cuda" else free_host_memory()

    # Loading: every equation becomes a call with its weights bound.

    def load_weights(self, weights: Mapping[str, Tensor], progress: Callable[[int], None]) -> None:
        lowering = _Lowering(self, weights, progress)
        main = self.graph.main
        numbers = {v: lowering.number() for v in main.inputs}
        self.results = lowering.function(main, numbers, 0)
        self.program, self.value_count = with_lifetimes(lowering.calls, self.results), lowering.count
        lowering.loaded.clear()
        trim_host_memory()
        if self.at.type == "cpu" and lowering.size > LARGE:
            use_huge_pages()

    def allocate(self, blocks: int, block_size: int, slots: int, max_tokens: int) -> None:
        dtype = DTYPES[self.kv_dtype]
        self.block_size = block_size
        try:
            self.kv = [
                ops.KV(*(torch.zeros(blocks, block_size, *t.sizes, dtype=dtype, device=self.at) for _ in range(2)))
                for t in self.graph.kv_types()
            ]
        except RuntimeError as error:  # torch.OutOfMemoryError, or the CPU allocator's own
            raise MemoryLimitError(f"no memory for {blocks} KV blocks: {error}", "lower max_model_len") from error
        self.slots = SlotState(slots, max_tokens, self.at)

    # Running

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        values: list[Any] = [None] * self.value_count
        inputs = [self._tokens(batch), on_device(batch.positions, self.at), *self.kv]
        values[: len(inputs)] = inputs
        step = context(batch, self.block_size, self.at)
        for call in self.program:
            result = call.run(step, *[values[n] for n in call.inputs])
            if len(call.outs) == 1:
                values[call.outs[0]] = result
            else:
                for n, one in zip(call.outs, result, strict=True):
                    values[n] = one
            for n in call.dead:  # its memory is the next ones'
                values[n] = None
        logits: torch.Tensor = values[self.results[0]]
        return logits

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: Batch, mask: np.ndarray | None = None) -> TorchTicket:
        self.slots.begin(batch.begun)
        count = len(batch.slots)
        tokens = sample(logits[:count], batch, self.slots, mask)
        self.slots.append(batch, tokens)
        if batch.logprobs < 0:
            return TorchTicket(tokens, None)
        came = torch.cat([tokens, on_device(batch.targets.astype(np.int64), self.at)])
        return TorchTicket(tokens, logprobs(logits, came, batch.logprobs))

    def to_host(self, logits: torch.Tensor) -> np.ndarray:
        return logits.cpu().numpy()

    def to_device(self, logits: np.ndarray) -> torch.Tensor:
        return on_device(logits, self.at)

    @torch.inference_mode()
    def ceilings(self) -> tuple[float, float]:
        cuda = self.at.type == "cuda"
        side, wait = (8192, lambda: torch.cuda.synchronize(self.at)) if cuda else (1024, lambda: None)
        data = torch.ones(2**30 if cuda else 2**26, device=self.at)
        matrix = torch.randn(side, side, device=self.at).to(self.type)
        reading = best_time(lambda: data.sum(), wait)
        return data.nbytes / reading, 2 * side**3 / best_time(lambda: matrix @ matrix, wait)

    def close(self) -> None:
        self.program, self.kv = [], []
        self.slots = SlotState(0, 0, self.at)
        if self.at.type == "cuda":
            torch.cuda.empty_cache()
        trim_host_memory()

    def _tokens(self, batch: Batch) -> torch.Tensor:
        """int64 (T,), with the slots' last tokens filled in."""
        tokens = on_device(batch.tokens.astype(np.int64), self.at)
        if (batch.tokens >= 0).all():
            return tokens
        return torch.where(tokens < 0, self.slots.last_token[(-1 - tokens).clamp(min=0)], tokens)


def with_lifetimes(calls: list[Call], results: list[int]) -> list[Call]:
    """The calls, each with the values that it is the last to read, or that nobody reads."""
    last = {n: at for at, call in enumerate(calls) for n in (*call.outs, *call.inputs)}
    dead: dict[int, list[int]] = {}
    for n, at in last.items():
        if n not in results:
            dead.setdefault(at, []).append(n)
    return [replace(call, dead=tuple(dead.get(at, ()))) for at, call in enumerate(calls)]


class _Lowering:
    """Turns equations into calls, layer by layer, and weights into what the calls need."""

    def __init__(self, backend: TorchBackend, weights: Mapping[str, Tensor], progress: Callable[[int], None]) -> None:
        self.backend, self.weights, self.progress = backend, weights, progress
        self.calls: list[Call] = []
        # a tied head shares the embeddings; the rest must not be kept, since a packed copy takes its place
        self.shared = {w for w, uses in Counter(backend.graph.weights()).items() if uses > 1}
        self.loaded: dict[Weight, torch.Tensor] = {}
        self.size = 0  # bytes of the weights
        self.count = 0

    def number(self) -> int:
        self.count += 1
        return self.count - 1

    def function(self, function: Function, numbers: dict[Value, int], layer: int) -> list[int]:
        for e in function.equations:
            if e.op == "call":
                callee = self.backend.graph.functions[e.params["function"]]
                inputs = {v: numbers[o] for v, o in zip(callee.inputs, e.inputs, strict=True) if isinstance(o, Value)}
                outs = self.function(callee, inputs, e.params["index"])
                numbers.update(zip(e.outs, outs, strict=True))
            else:
                numbers.update((v, self.number()) for v in e.outs)
                self.calls.append(self._equation(e, numbers, layer))
        return [numbers[v] for v in function.outs]

    def _equation(self, e: Equation, numbers: dict[Value, int], layer: int) -> Call:
        values = [numbers[o] for o in e.inputs if isinstance(o, Value)]
        weights = [at_layer(o, layer) for o in e.inputs if isinstance(o, Weight)]
        params = {k: v for k, v in e.params.items() if k != "shard"}  # one device
        if e.op == "linears":
            params["rows"] = [v.type.shape[1] for v in e.outs]
        run = partial(ops.OPS[e.op], **params)
        if e.op == "norm_rope_store":  # q, its norm, positions, k, its norm, v, kv
            run = partial(_with_weight, run, self._head_norms(e, weights))
        elif weights:  # every rule takes its weights, as one argument, after its values
            run = partial(_with_weight, run, self._bound(e.op, weights))
        return Call(run, values, [numbers[v] for v in e.outs])

    def _bound(self, op: str, weights: list[Weight]) -> Any:
        """What the rule of `op` takes for its weights: a function for matrices and tables, a tensor for vectors."""
        if op == "embed":
            return self._table(weights[0])
        if op == "moe":
            return self._experts(*weights)
        tensors = [self._tensor(w) for w in weights]
        return ops.Norm.of(tensors[0]) if op == "rms_norm" else prepare(tensors[0], *tensors[1:])

    def _head_norms(self, e: Equation, weights: list[Weight]) -> torch.Tensor:
        """The norms' weights for each head, (H + Hk, d); in float32 where something is added to them."""
        counts = [e.inputs[at].type.sizes[0] for at in (0, 3)]
        norms = torch.cat([self._tensor(w).expand(n, -1) for w, n in zip(weights, counts, strict=True)])
        return norms.float() + e.params["offset"] if e.params.get("offset") else norms

    def _table(self, weight: Weight) -> Callable[[torch.Tensor], torch.Tensor]:
        """Rows by number. On the CPU they are read from the file, so that a packed head needs no second copy."""
        if self.backend.at.type == "cpu" and len(weight.segments) == 1:
            rows, dtype = _torch_view(self.weights[weight.segments[0].tensor]), self.backend.type
            return lambda tokens: rows[tokens].to(dtype)
        table = self._tensor(weight)
        return lambda tokens: table[tokens]

    def _experts(self, router: Weight, *stacks: Weight) -> ops.Experts:
        """Every expert's matrices by themselves; a segment holds one expert, or several."""
        count = router.type.sizes[0]
        split = [[m for w in _segments(s) for m in self._tensor(w).split(s.type.sizes[0] // count)] for s in stacks]
        return ops.Experts(
            self._tensor(router), [(prepare(g), prepare(u), prepare(d)) for g, u, d in zip(*split, strict=True)]
        )

    def _tensor(self, weight: Weight) -> torch.Tensor:
        if weight in self.loaded:
            return self.loaded[weight]
        found = [self.weights[s.tensor] for s in weight.segments]
        parts = [_torch_view(t).to(self.backend.at, self.backend.type) for t in found]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.progress(sum(t.nbytes for t in found))
        self.size += tensor.nbytes
        if weight in self.shared:
            self.loaded[weight] = tensor
        return tensor


def _segments(weight: Weight) -> list[Weight]:
    return [Weight((segment,), weight.columns) for segment in weight.segments]


def _with_weight(run: Callable[..., Any], weight: Any, context: Context, *values: Any) -> Any:
    return run(context, *values, weight)


def _torch_view(tensor: Tensor) -> torch.Tensor:
    """The file's own memory as a torch tensor."""
    data = torch.from_numpy(tensor.data)
    return data.view(torch.bfloat16) if tensor.format == "bf16" else data
