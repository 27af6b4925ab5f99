"""Runs steps with Triton kernels: a step's arrays in one transfer, and recorded graphs where a shape has one.

Nothing here waits for the device. The tokens of a step that the host does not know yet are looked up there, by slot.
"""

import gc
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from llmrs.backends.torch.attn_metadata import Shape, StepInputs, programs, shape_of
from llmrs.backends.torch.cuda_graphs import (
    COPIES,
    DECODE,
    Recorded,
    Recorder,
    Recording,
    bucket,
    covering_shapes,
    decode_shapes,
    kernel_shapes,
)
from llmrs.backends.torch.kernel_configs import Cuts, Device, pool_type
from llmrs.backends.torch.kernels.gemm import NORMED, most_rows
from llmrs.backends.torch.kernels.gumbel_argmax import draw
from llmrs.backends.torch.kernels.launch import chaining, hopper, interpreted
from llmrs.backends.torch.kernels.top_k_top_p import find_edges
from llmrs.backends.torch.library import LIBRARIES, Library, Parts, parts_of
from llmrs.backends.torch.ops import KV
from llmrs.backends.torch.program import Program, Programs
from llmrs.backends.torch.sampling import SlotState, adjusted
from llmrs.backends.torch.trials import Trials
from llmrs.backends.torch.triton_ops import KernelContext, Turns
from llmrs.backends.torch.tuning import cache_file, keys_of, tune
from llmrs.core.batch import Batch
from llmrs.core.errors import BackendError
from llmrs.core.ir import Graph
from llmrs.core.sampling import SamplingArrays

BLOCK_SIZE = 64  # tokens of a KV block: a tile of keys lies in one
CHAINED = 512  # tokens of a step up to which kernels are chained; of more, their gaps do not matter
SMALL = 1024  # tokens of a step that is recorded though its prompts are for a library, and so go without it
UNRECORDED = {"moe"}  # ops whose rules ask the device what to do
COMMON = 4  # steps of a shape before it is captured though a larger one holds it
CAPTURE_SHARE = 0.02  # of the time, at most, goes to such captures while requests run


class KernelRunner:
    """The steps of one program on one pool. Life: `begin`, any number of `forward` and `sample`, `end`."""

    def __init__(
        self,
        device: torch.device,
        *,
        graphs: bool,
        attention: str = "triton",
        tune: bool | None = False,
    ) -> None:
        """`attention` may be a library's: then it does the parts of prompts of steps that are not recorded. `tune` says
        whether launches are timed at `begin` to find the best cuts, None: on a GPU of which none are stored.

        Raises BackendError where kernels can't run: they need an NVIDIA GPU, or Triton's interpreter.
        """
        if device.type != "cuda" and not interpreted():
            raise BackendError(f"Triton kernels don't run on {device}", "kernels: auto uses them where they do")
        self.device, self.wanted = device, graphs
        self.fused = True  # steps of few rows run a program of their own; see fusing.py
        self.chain = True  # programmatic dependent launch, where the GPU has it; see kernels/launch.py
        self.aside = device.type == "cuda"  # tokens are copied on a stream of their own; see tickets.py
        self.copies = hopper(device)  # which loads the keys of prompts; see kernels/prompt.py
        self.library: Library | None = LIBRARIES[attention]() if attention in LIBRARIES else None
        self.cuts = Cuts(Device.of(device))
        self.tunes = self.cuts.device.unknown if tune is None else tune
        self.clock: Callable[[], float] = time.monotonic
        self.end()

    def end(self) -> None:
        """Lets go of everything."""
        self.program, self.kv = Program([], 0, []), list[KV]()
        self.one, self.few, self.few_rows = self.program, self.program, 0  # what runs steps of one row, and of few
        self.slots = SlotState(0, 0, self.device)
        self.tokens = torch.empty(0, dtype=torch.int32, device=self.device)  # of the last step, where they go aside
        self.recorded: dict[Shape, Recorded] = {}
        self.uncaptured: list[Shape] = []  # to be captured when no request runs, the last first
        self.next_capture = 0.0  # not before this time while requests run
        self.step: tuple[Batch, StepInputs, Recorded | None] | None = None
        self.recorders: tuple[Recorder, Recorder] | None = None  # of forward parts, and of sampling ones

    def begin(
        self,
        graph: Graph,
        lowered: Programs,
        kv: Sequence[KV],
        slots: SlotState,
        dtype: torch.dtype,
        *,
        room: int = 0,
        step_tokens: int = 0,
    ) -> None:
        """`kv` have a block more than anybody is given: what is padded goes there. The largest step has `step_tokens`
        tokens, and its results may take `room` bytes."""
        self.end()
        (self.program, self.one, self.few), self.kv, self.slots = lowered, list(kv), slots
        self.few_rows = most_rows(dtype, self.device) if self.fused else 0
        blocks, self.block_size = kv[0].keys.shape[:2]
        self.spare = blocks - 1
        if blocks * self.block_size >= 2**31:
            raise BackendError(f"{blocks} KV blocks of {self.block_size} tokens are too many", "lower kv_cache_memory")
        self.longest = slots.tokens.shape[1]
        self.tokens = torch.empty(max(len(slots.tokens), DECODE[-1]), dtype=torch.int32, device=self.device)
        self.turns = Turns(self.longest, self.device)
        self.programs = programs(self.device, *kv[0].keys.shape[2:])
        keys = keys_of(graph, dtype, pool_type(kv[0].keys))
        if self.tunes:
            trials = Trials(self.kv, len(slots.last_token), self.longest, self.device)
            tune(self.cuts, keys, trials, cache_file(self.cuts.device))
            trials.end()
        self.tile = min(self.cuts.of(k)[0] for k in keys if k.kernel == "prompt")
        if self.wanted and not UNRECORDED & {c.op for c in self.program.calls}:
            self.recorders = Recorder(self.device, room), Recorder(self.device)
        if self.device.type == "cuda":  # the interpreter compiles nothing, and takes minutes
            self._load(step_tokens)

    def check(self, graph: Graph, dtype: torch.dtype) -> None:
        """Raises BackendError for a model that the chosen attention can't do."""
        if self.library:
            self.library.check(graph, dtype)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (R, V), in the type of the computation; they stay until the next step."""
        exact = shape_of(batch, self.tile, self.programs)
        found = self._recorded(batch, exact)
        inputs = found.inputs if found else StepInputs(exact, batch.block_tables.size, self.device)
        inputs.fill(batch, self.block_size, self.spare, self.tile)
        self.step = batch, inputs, found
        if found is None:
            return self._run(inputs, parts_of(batch, self.block_size, self.device) if self.library else None)
        logits = found.forward() if found.forward else self._run(inputs)
        return logits[: len(batch.logits_indices)]

    def sample(self, logits: torch.Tensor, batch: Batch, mask: np.ndarray | None) -> torch.Tensor:
        """Token ids int32 (S,), kept as the slots' last tokens too."""
        count, filtered = len(batch.req_slots), _filters(batch.sampling)
        inputs, found = self._inputs_of(batch)
        plain = adjusted(logits[:count], batch, self.slots, mask)
        as_it_was = plain.data_ptr() == logits.data_ptr()
        if found and found.forward and as_it_was:
            tokens = self._sampled(found, filtered)()[:count]
        else:
            tokens = self._draw(plain, inputs, filtered)
        if not as_it_was and batch.sampling.needs_history().any():  # whoever does was adjusted
            self.slots.append(batch, tokens.long())
        return tokens

    @torch.inference_mode()
    def idle(self) -> bool:
        """While no request runs: captures a shape that came, or is likely to come. True: there are more."""
        while self.uncaptured:
            found = self._static(self.uncaptured.pop())
            if found.forward is None:
                self._capture(found)
                break
        return bool(self.uncaptured)

    @torch.inference_mode()
    def _load(self, step_tokens: int) -> None:
        """Loads the kernels of steps up to this number of tokens, and captures the few shapes that hold nearly every
        step: no request waits for either."""
        sizes = len(self.slots.last_token), step_tokens, self.tile, self.programs
        for shape in kernel_shapes(*sizes):
            inputs = StepInputs(shape, shape.sequences, self.device)
            inputs.rest(self.spare * self.block_size)
            logits = self._run(inputs, once=True)
            for filtered in (False, True) if shape.plain else ():
                self._draw(logits, inputs, filtered)
        for shape in covering_shapes(*sizes) if self.recorders else ():
            self._capture(self._static(shape))
        self.uncaptured = decode_shapes(sizes[0], self.programs) if self.recorders else []
        gc.collect()  # now: a full collection stops everything for 0.1 s, and the next is due when much more is there

    def _recorded(self, batch: Batch, exact: Shape) -> Recorded | None:
        """The shape that can run a step and be run again; None: there is none."""
        if self.recorders is None or len(batch.logits_indices) != len(batch.req_slots):
            return None
        if self.library and len(batch.input_ids) > SMALL:
            return None
        shape = bucket(exact, self.tile, self.programs)
        return self._ready(shape) if shape else None

    def _ready(self, shape: Shape) -> Recorded:
        """What runs a step of this shape now: its own graph, else that of a larger shape, else none.

        All requests wait for a capture. It takes as long as a step without a graph, so a shape that no graph holds is
        captured when it comes again; the others take turns, in a small share of the time.
        """
        own = self._static(shape)
        if own.forward:
            return own
        own.came += 1
        if own.came == 1:
            self.uncaptured.append(shape)
        larger = [r for r in self.recorded.values() if r.holds(shape)]
        begin = self.clock()
        due = (own.came >= COMMON and begin >= self.next_capture) if larger else own.came > 1
        if due:
            self._capture(own)
            end = self.clock()
            self.next_capture = end + (end - begin) / CAPTURE_SHARE
            return own
        return min(larger, key=lambda r: (r.inputs.shape.tokens, r.inputs.shape.sequences), default=own)

    def _static(self, shape: Shape) -> Recorded:
        if shape not in self.recorded:
            tables = shape.sequences * -(-self.longest // self.block_size)
            self.recorded[shape] = Recorded(StepInputs(shape, tables, self.device, COPIES))
        return self.recorded[shape]

    def _capture(self, found: Recorded) -> None:
        """Both parts, of a step of no sequence: on a CPU it is run."""
        assert self.recorders is not None
        found.inputs.rest(self.spare * self.block_size)
        found.forward = self.recorders[0].record(lambda: self._run(found.inputs))
        self._sampled(found, False)

    def _sampled(self, found: Recorded, filtered: bool) -> Recording:
        """The sampling part, from the logits of the forward part."""
        if filtered not in found.sample:
            assert self.recorders is not None
            assert found.forward is not None, "the sampling part is captured after the forward part"
            logits = found.forward.result
            found.sample[filtered] = self.recorders[1].record(lambda: self._draw(logits, found.inputs, filtered))
        return found.sample[filtered]

    def _inputs_of(self, batch: Batch) -> tuple[StepInputs, Recorded | None]:
        """What `forward` sent; a step that is only sampled, as in tests, is sent now."""
        if self.step is not None and self.step[0] is batch:
            return self.step[1:]
        inputs = StepInputs(Shape(0, len(batch.req_slots), 0, 0), 0, self.device)
        inputs.fill_sampling(batch)
        return inputs, None

    def _run(self, inputs: StepInputs, parts: Parts | None = None, *, once: bool = False) -> torch.Tensor:
        """Logits. `once`: no kernel is launched again for another layer, so that the values mean nothing."""
        f, last = inputs.fields, self.slots.last_token
        library = (self.library, parts) if self.library and parts else None
        context = KernelContext(inputs.shape, f, last, self.turns, self.tile, self.cuts, library, self.copies)
        with chaining(self.chain and inputs.shape.tokens <= CHAINED):
            program = self._program(inputs.shape)
            run = program.run_once if once else program.run
            logits: torch.Tensor = run(context, [f.tokens, f.positions, *self.kv])[0]
        return logits

    def _program(self, shape: Shape) -> Program:
        """By tokens, and by wanted rows, of which one token of a prompt can have two."""
        if shape.tokens > self.few_rows:
            return self.program
        return self.one if max(shape.tokens, shape.sequences) <= NORMED else self.few

    def _draw(self, logits: torch.Tensor, inputs: StepInputs, filtered: bool) -> torch.Tensor:
        """Token ids int32 (n,) of the step's first n sequences."""
        n, f, edges = len(logits), inputs.fields, None
        temperature, last = f.temperature[:n], self.slots.last_token
        out = self.tokens[:n] if self.aside else None
        with chaining(self.chain and n <= CHAINED):
            if filtered:
                edges = find_edges(logits, temperature, f.top_k[:n], f.top_p[:n], f.min_p[:n])
            return draw(logits, temperature, f.keys[:n], f.slots[:n], last, edges, out=out)


def _filters(params: SamplingArrays) -> bool:
    """Whether top-k, top-p or min-p drop anything from a row that is drawn."""
    return bool(((params.temperature > 0) & ((params.top_k > 0) | (params.top_p < 1) | (params.min_p > 0))).any())
