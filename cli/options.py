"""Options of the command line beyond engine and sampling, defined as in core/options.py."""

from dataclasses import dataclass

from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.core.options import Checked, SamplingParams, option


@dataclass(frozen=True)
class RunOptions(Checked):
    """The prompts, and where the outputs go."""

    prompts: list[str] | None = option(
        None, "a list, text split at '|', a file with one prompt per line, or '-' for standard input"
    )
    chat: bool = option(True, "apply the model's chat template; false: complete plain text")
    system: str | None = option(None, "system message of every prompt or conversation")
    interactive: bool = option(False, "chat, as `llmrs chat` does", ("i",))
    output: str | None = option(None, "also write one JSON object per request to this file", ("o",))
    json: bool = option(False, "print one JSON object per request instead of text")
    trace: str | None = option(None, "write a timeline of the engine's steps to this file, in Chrome's trace format")


@dataclass(frozen=True)
class IgnoredOptions(Checked):
    """Accepted without effect: vllm.rs's `flash`, and choices of earlier versions."""

    flash: bool = option(False, "no effect: decode attention is always flash decoding")
    attention: str = option("auto", "no effect: prefill attention is llmrs's own kernel")
    tune: bool | None = option(None, "no effect: launch configs are stored or derived, not timed at load")


@dataclass(frozen=True)
class UnimplementedOptions(Checked):
    """Options of features that do not exist yet, known so that the error can name them."""

    batch: int | None = option(None, "benchmark with this many requests (not implemented)", low=1, high=2**20)
    host: str | None = option(None, "address of the server (not implemented)")
    port: int | None = option(None, "port of the server (not implemented)", low=0, high=65535)

    def refuse(self) -> None:
        """Raises ConfigError for the first option that is set."""
        for name, value in vars(self).items():
            if value is not None:
                hint = "use `llmrs bench --batches 8`" if name == "batch" else "leave it out: llmrs has no server yet"
                raise ConfigError(f"{name} is not implemented", hint)


@dataclass(frozen=True)
class BenchOptions(Checked):
    """The measurements of `llmrs bench`. Without any of the first six: decode by batch size, and a prefill."""

    workloads: str | None = option(None, "run these workloads, comma-separated: seed, mixed, single, prefill")
    arrivals: list[float] | None = option(
        None, "run mixed with Poisson arrivals at these fractions of its measured request rate",
        low=0.01, high=10.0, most=16)  # fmt: skip
    scale: float = option(1.0, "fraction of each workload's requests and tokens", low=0.001, high=1.0)
    contexts: list[int] | None = option(
        None, "time decode steps of every batch size at these context lengths (512)", low=1, high=2**24, most=64
    )
    plot: str | None = option(None, "plot tokens/s and roofline by batch size and context to this SVG file")
    profile: bool = option(False, "time each kernel of a decode step, at these batch sizes and contexts")
    start: bool = option(False, "time new processes from start to first token")
    host: bool = option(False, "measure only the CPU overhead per step")
    batches: list[int] | None = option(None, "batch sizes (1, 8, 32)", low=1, high=4096, most=64)
    prompt_tokens: int = option(32, "prompt length in tokens", low=1, high=2**20)
    new_tokens: int = option(128, "generated tokens per request", low=2, high=2**20)
    json: bool = option(False, "print one JSON object")

    @property
    def sweep(self) -> bool:
        """Whether decode steps are timed by batch size and context."""
        return self.plot is not None or (self.contexts is not None and not self.profile)

    @property
    def decode(self) -> bool:
        """The default measurement, where no other is chosen."""
        others = self.sweep or self.profile or self.start or self.host
        return self.workloads is None and self.arrivals is None and not others

    def check(self) -> None:
        """Raises ConfigError for an option without effect, with the option that it needs."""
        other, steps = "leave out the other measurements", self.sweep or self.profile
        used = {
            "scale": (self.workloads is not None or self.arrivals is not None, "add --workloads or --arrivals"),
            "batches": (steps or self.decode or self.host, "add --contexts or --profile, or leave it out"),
            "prompt_tokens": (self.decode, other),
            "new_tokens": (self.decode, other),
        }
        for name in ("workloads", "arrivals", "contexts", "profile", "plot", "start") if self.host else ():
            if getattr(self, name) not in (None, False):
                raise ConfigError(f"host excludes other measurements: {name}", "leave one of them out")
        for name, (has_effect, hint) in used.items():
            if not has_effect and getattr(self, name) != getattr(BenchOptions, name):
                raise ConfigError(f"{name} has no effect on these measurements", hint)


# Options that need more than one kind of request: hints by name, and the reason, for Settings.without.
PER_REQUEST = ({"priority": "leave it out; in Python it is set per request"}, "all requests of a command share it")

# Contents of a config file and of the flags, under the headings of help and docs.
SECTIONS: dict[str, type] = {
    "Prompts and output": RunOptions,
    "Model and memory": EngineConfig,
    "Sampling": SamplingParams,
    "Without effect": IgnoredOptions,
    "Not implemented": UnimplementedOptions,
}
