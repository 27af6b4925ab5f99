"""The app: handlers call the controller and show its results in the view."""

from pathlib import Path
from typing import Any

import toga

from llmrs import LlmrsError
from llmrs_chat.controller import Controller, tokens_per_second
from llmrs_chat.views import ChatView

BUDGETS = {"as needed": None, "64 MB": 64 * 10**6, "256 MB": 256 * 10**6, "1 GB": 10**9, "4 GB": 4 * 10**9}


class ChatApp(toga.App):
    def startup(self) -> None:
        handlers = {name: getattr(self, name) for name in ("send", "stop", "cancel", "choose", "open_folder", "new")}
        self.controller = Controller()
        self.view = ChatView(BUDGETS, handlers)
        self.main_window = toga.MainWindow(title=self.formal_name, size=(760, 560))
        self.main_window.content = self.view.box
        self.main_window.show()

    async def on_running(self) -> None:
        await self.load("demo", self.saved_budget())

    async def on_exit(self) -> bool:
        await self.controller.close()
        return True

    async def send(self, widget: toga.Widget, **_: Any) -> None:
        question = self.view.question.value.strip()
        if not question or not self.view.send.enabled:  # Return comes here too, also during an answer
            return
        self.view.answers(question)
        try:
            output = await self.controller.ask(question, self.view.add)
            self.view.status.text = f"{output.decoded_length} tokens, {tokens_per_second(output):.1f} tokens/s"
        except LlmrsError as error:
            self.view.show_problem(error)
            self.view.question.value, self.view.status.text = question, ""
        self.view.add("\n\n")
        self.view.waits(ready=self.controller.model is not None)

    def stop(self, widget: toga.Widget, **_: Any) -> None:
        self.controller.stop()

    def cancel(self, widget: toga.Widget, **_: Any) -> None:
        self.controller.cancel_loading()

    def new(self, widget: toga.Widget, **_: Any) -> None:
        self.controller.new_conversation()
        self.view.conversation.value = ""

    async def choose(self, widget: toga.Widget, **_: Any) -> None:
        """Switches model or budget. Also called when the app itself sets a selection."""
        wanted = self.view.models.choice, self.view.budgets.choice
        if self.view.models.enabled and wanted != self.loaded():
            await self.load(*wanted)

    async def open_folder(self, widget: toga.Widget, **_: Any) -> None:
        folder = await self.main_window.dialog(toga.SelectFolderDialog("A model's folder"))
        if folder is not None:
            await self.load(str(folder), self.view.budgets.choice)

    async def load(self, model: str, budget: int | None) -> None:
        """Loads a model, and shows the one loaded afterwards."""
        self.view.loads(model)
        try:
            await self.controller.switch(model, budget, self.view.advance)
            self.save_budget(budget)
        except LlmrsError as error:
            self.view.show_problem(error)
        self.show_loaded()

    def show_loaded(self) -> None:
        model, budget = self.loaded()
        self.view.status.text = "No model is loaded"
        if model is not None:
            self.view.models.choose(model, Path(model).name)
            self.view.budgets.choose(budget, "as needed")
            self.view.status.text = f"{Path(model).name}: up to {self.controller.context:,} tokens"
        self.view.waits(ready=model is not None)

    def loaded(self) -> tuple[str | None, int | None]:
        config = self.controller.config
        return (config.model_path, config.kv_cache_memory) if config else (None, None)

    def saved_budget(self) -> int | None:
        """The last choice; None for one of another version of the app."""
        file = self.paths.config / "budget.txt"
        return BUDGETS.get(file.read_text("utf-8")) if file.exists() else None

    def save_budget(self, budget: int | None) -> None:
        self.paths.config.mkdir(parents=True, exist_ok=True)
        name = next(name for name, value in BUDGETS.items() if value == budget)
        (self.paths.config / "budget.txt").write_text(name, "utf-8")
