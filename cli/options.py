"""What `llmrs run` and `llmrs chat` know beyond the engine and sampling: defined as in core/options.py."""

from dataclasses import dataclass

from llmrs.config import EngineConfig
from llmrs.core.errors import ConfigError
from llmrs.core.options import Checked, SamplingParams, option


@dataclass(frozen=True)
class RunOptions(Checked):
    """Which prompts are answered, and how the answers are shown."""

    prompts: list[str] | None = option(
        None, "what to answer: a list, one text split at '|', a file with one prompt a line, or '-' for standard input"
    )
    chat: bool = option(True, "put each prompt through the model's chat template; false: complete it as plain text")
    system: str | None = option(None, "system message before each prompt or conversation")
    interactive: bool = option(False, "talk to the model, as `llmrs chat` does", ("i",))
    output: str | None = option(None, "also write one JSON object per request to this file", ("o",))
    json: bool = option(False, "print one JSON object per request instead of text")
    trace: str | None = option(None, "write what each step spends its time on to this file, in Chrome's trace format")
    flash: bool | None = option(None, "vllm.rs's word for attention: flash")


@dataclass(frozen=True)
class LaterOptions(Checked):
    """Options of parts that are not there yet. They are known, so that they can be refused by name."""

    batch: int | None = option(None, "benchmark with this many requests (not there yet)", low=1, high=2**20)
    host: str | None = option(None, "address of the server (not there yet)")
    port: int | None = option(None, "port of the server (not there yet)", low=0, high=65535)

    def refuse(self) -> None:
        """Raises ConfigError for the first option that is set."""
        hints = {"batch": "`llmrs bench --batches 8` measures 8 answers at once"}
        for name, value in vars(self).items():
            if value is not None:
                hint = hints.get(name, "leave it out; there is no server to set it for")
                raise ConfigError(f"{name} is not there yet", hint)


@dataclass(frozen=True)
class BenchOptions(Checked):
    """What `llmrs bench` measures, and how it is shown. Without any of the first: decoding, and a prompt of 512."""

    workloads: str | None = option(None, "run these, with commas between: seed, mixed, single, prefill")
    arrivals: list[float] | None = option(
        None, "run mixed with requests coming at these shares of the rate of all at once", low=0.01, high=10.0, most=16
    )
    scale: float = option(1.0, "part of a workload's requests and tokens", low=0.001, high=1.0)
    contexts: list[int] | None = option(
        None, "time decode steps of every batch at these contexts (512)", low=1, high=2**24, most=64
    )
    plot: str | None = option(None, "draw tokens/s by batch and context, with the ceiling, to this SVG file")
    profile: bool = option(False, "show where a decode step goes, kernel by kernel, at these batches and contexts")
    start: bool = option(False, "time fresh processes from their start to the first token")
    host: bool = option(False, "only the host's part of a step, on a device that answers at once")
    batches: list[int] | None = option(None, "answers at once (1, 8, 32)", low=1, high=4096, most=64)
    prompt_tokens: int = option(32, "tokens of each prompt", low=1, high=2**20)
    new_tokens: int = option(128, "tokens of each answer", low=2, high=2**20)
    json: bool = option(False, "print one JSON object")

    @property
    def grid(self) -> bool:
        """Whether decode steps are timed at batches and contexts."""
        return self.plot is not None or (self.contexts is not None and not self.profile)

    @property
    def table(self) -> bool:
        """Whether nothing else was asked for."""
        others = self.grid or self.profile or self.start or self.host
        return self.workloads is None and self.arrivals is None and not others

    def check(self) -> None:
        """Raises ConfigError for an option that would change nothing, with what would give it a meaning."""
        steps, alone = self.grid or self.profile, "give no other measurement beside it"
        matters = {
            "scale": (self.workloads is not None or self.arrivals is not None, "add --workloads or --arrivals"),
            "batches": (steps or self.table or self.host, "add --contexts or --profile, or leave it out"),
            "prompt_tokens": (self.table, alone),
            "new_tokens": (self.table, alone),
        }
        for name in ("workloads", "arrivals", "contexts", "profile", "plot", "start") if self.host else ():
            if getattr(self, name) not in (None, False):
                raise ConfigError(f"host: nothing else is measured with it, not {name}", "leave one of them out")
        for name, (there, hint) in matters.items():
            if not there and getattr(self, name) != getattr(BenchOptions, name):
                raise ConfigError(f"{name} changes nothing in what is measured", hint)


# What requests differ in only from Python: hints by name, and the reason, for Settings.without.
SAME_FOR_ALL = (
    {"priority": "leave it out; from Python each request may have its own"},
    "all requests of a command have the same",
)

# What a config file and the flags may hold, with the headings for help and docs.
SECTIONS: dict[str, type] = {
    "Prompts and output": RunOptions,
    "Model and memory": EngineConfig,
    "Sampling": SamplingParams,
    "Not there yet": LaterOptions,
}
