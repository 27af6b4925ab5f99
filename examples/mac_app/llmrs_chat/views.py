"""The window's widgets, and their states: loading, answering, waiting."""

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import toga
from toga.constants import COLUMN, ROW
from toga.style import Pack

from llmrs import LlmrsError

Handler = Callable[..., Any]
LINE = 90  # characters of an error's line: labels don't wrap


class Switch(toga.Selection):
    """A list of choices by name. `on_change` is called for choices of the user and of the app."""

    def __init__(self, choices: Mapping[str, object], on_change: Handler) -> None:
        rows = [{"name": name, "choice": choice} for name, choice in choices.items()]
        super().__init__(items=rows, accessor="name", on_change=on_change)

    @property
    def choice(self) -> Any:
        return self.value.choice

    def choose(self, choice: object, name: str) -> None:
        """Selects a choice, and adds a new one."""
        row = next((row for row in self.items if row.choice == choice), None)
        self.value = self.items.append({"name": name, "choice": choice}) if row is None else row


class ChatView:
    """`handlers` are the app's: send, stop, cancel, choose, open_folder, new."""

    def __init__(self, budgets: Mapping[str, object], handlers: Mapping[str, Handler]) -> None:
        self.models = Switch({"demo": "demo"}, handlers["choose"])
        self.budgets = Switch(budgets, handlers["choose"])
        self.open_folder = toga.Button("Open Folder…", on_press=handlers["open_folder"])
        self.new = toga.Button("New Conversation", on_press=handlers["new"])
        self.progress = toga.ProgressBar(style=Pack(flex=1))
        self.cancel = toga.Button("Cancel", on_press=handlers["cancel"])
        self.conversation = toga.MultilineTextInput(readonly=True, style=Pack(flex=1))
        self.problem = toga.Label("", style=Pack(color="#c02020"))
        self.status = toga.Label("")
        self.question = toga.TextInput(placeholder="Ask something", on_confirm=handlers["send"], style=Pack(flex=1))
        self.send = toga.Button("Send", on_press=handlers["send"])
        self.stop = toga.Button("Stop", on_press=handlers["stop"])
        self.box = self._arranged()
        self.waits(ready=False)

    def _arranged(self) -> toga.Box:
        rows = [
            row(self.models, self.open_folder, toga.Label("Memory"), self.budgets, self.new),
            row(self.progress, self.cancel),
            self.conversation,
            self.problem,
            row(self.question, self.send, self.stop),
            self.status,
        ]
        return toga.Box(children=rows, style=Pack(direction=COLUMN, margin=10, gap=8))

    def loads(self, model: str) -> None:
        self.show_problem(None)
        self._enable(self.cancel)
        self.progress.value = 0.0
        self.status.text = f"Loading {Path(model).name}"

    def advance(self, done: int, total: int) -> None:
        self.progress.value = done / total

    def answers(self, question: str) -> None:
        self.show_problem(None)
        self._enable(self.stop)
        self.question.value = ""
        self.status.text = "Answering"
        self.add(f"You: {question}\n\nllmrs: ")

    def waits(self, *, ready: bool) -> None:
        """Idle; `ready`: a model is loaded."""
        choices = (self.models, self.budgets, self.open_folder, self.new)
        self._enable(*choices, *((self.send,) if ready else ()))

    def _enable(self, *widgets: toga.Widget) -> None:
        changing = (self.models, self.budgets, self.open_folder, self.new, self.cancel, self.send, self.stop)
        for widget in changing:
            widget.enabled = widget in widgets

    def add(self, text: str) -> None:
        self.conversation.value += text
        self.conversation.scroll_to_bottom()

    def show_problem(self, error: LlmrsError | None) -> None:
        """Shows the error's message above its hint."""
        lines = [error.message, error.hint and f"Hint: {error.hint}"] if error else []
        self.problem.text = "\n".join(textwrap.fill(line, LINE) for line in lines if line)


def row(*widgets: toga.Widget) -> toga.Box:
    return toga.Box(children=list(widgets), style=Pack(direction=ROW, gap=8, align_items="center"))
