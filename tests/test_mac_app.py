"""The chat app for Macs: its controller with the bundled model, and the app in windows that nobody sees."""

import asyncio
import shutil
import subprocess
import sys
import threading
import tomllib

import pytest
from measure import ROOT

from llmrs import Engine, EngineConfig, LlmrsError, LoadCancelledError, MemoryLimitError, ModelError, SamplingParams
from llmrs.models import demo

APP = ROOT / "examples" / "mac_app"
SUM = "What is 7 + 5?"
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True)


@pytest.fixture
def controllers(monkeypatch):
    """The module, from the app's folder; every engine that a test makes must have ended with it."""
    monkeypatch.syspath_prepend(APP)
    import llmrs_chat.controller

    yield llmrs_chat.controller
    assert not engine_threads()


def engine_threads():
    return [t for t in threading.enumerate() if t.name == "llmrs"]


def ignore(*_):
    """Nobody wants to know."""


async def until(condition, *tasks):
    """Lets the others run until something has come about, or the tasks that it must come from have ended."""
    while not condition() and not any(t.done() for t in tasks):
        await asyncio.sleep(0.001)
    assert condition()


class Gate:
    """While it lasts, or until `open`, a controller's Engine stops after its first weights."""

    def __init__(self, monkeypatch, module):
        self.reached, self.opened, self.steps = threading.Event(), threading.Event(), 0
        monkeypatch.setattr(module, "Engine", self.engine)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.open()

    def engine(self, config, *, progress, on_fit):
        def stop(done, total):
            self.steps += 1
            progress(done, total)
            self.reached.set()
            self.opened.wait()
            return progress(done, total)

        return Engine(config, progress=stop, on_fit=on_fit)

    def open(self):
        self.opened.set()


@pytest.fixture
def broken(tmp_path):
    """A model's folder whose weights are cut off."""
    folder = shutil.copytree(demo.FILES, tmp_path / "broken")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return folder


@pytest.fixture
def copied(tmp_path):
    """The bundled model as a folder that a user may open."""
    return shutil.copytree(demo.FILES, tmp_path / "copied")


def test_the_controller_streams_a_conversation(controllers):
    async def talk():
        controller, pieces, progress = controllers.Controller(GREEDY), [], []
        await controller.switch("demo", None, lambda done, total: progress.append((done, total)))
        output = await controller.ask(SUM, pieces.append)
        again = await controller.ask("And 2 + 2?", ignore)
        messages = controller.messages
        controller.new_conversation()
        fresh = await controller.ask(SUM, ignore)
        await controller.close()
        return progress, pieces, output, messages, again, fresh

    progress, pieces, output, messages, again, fresh = asyncio.run(talk())
    assert progress[-1][0] == progress[-1][1] > 0
    assert len(pieces) > 1
    assert "".join(pieces) == output.text == fresh.text == "7 + 5 = 12."
    assert [m.role for m in messages] == ["user", "assistant"] * 2
    assert again.cached_tokens > 0
    assert fresh.prompt_length == output.prompt_length < again.prompt_length
    assert controllers.tokens_per_second(output) > 0


def test_the_loop_runs_while_a_model_is_loaded(controllers, monkeypatch):
    async def load():
        controller, threads = controllers.Controller(), set()
        with Gate(monkeypatch, controllers):
            task = asyncio.ensure_future(
                controller.switch("demo", None, lambda *_: threads.add(threading.current_thread()))
            )
            await until(lambda: threads, task)  # the loading waits, and its progress has come here
        await task
        await controller.close()
        return threads

    assert asyncio.run(load()) == {threading.main_thread()}


def test_stop_ends_an_answer_and_the_next_one_comes(controllers):
    async def talk():
        controller, pieces = controllers.Controller(ENDLESS), []
        await controller.switch("demo", None, ignore)
        task = asyncio.ensure_future(controller.ask(SUM, pieces.append))
        await until(lambda: len(pieces) > 3, task)
        controller.stop()
        stopped = await task
        controller.new_conversation()
        controller.sampling = GREEDY
        output = await controller.ask(SUM, ignore)
        await controller.close()
        return stopped, output

    stopped, output = asyncio.run(talk())
    assert stopped.finish_reason == "cancelled"
    assert 3 < stopped.decoded_length < 4000
    assert output.text == "7 + 5 = 12."


def test_a_cancelled_loading_brings_back_what_was_there(controllers, monkeypatch, copied):
    async def switch():
        controller = controllers.Controller(GREEDY)
        await controller.switch("demo", None, ignore)
        with monkeypatch.context() as patched, Gate(patched, controllers) as gate:
            task = asyncio.ensure_future(controller.switch(str(copied), None, ignore))
            await until(gate.reached.is_set, task)
            during = controller.model
            controller.cancel_loading()
            gate.open()
            with pytest.raises(LoadCancelledError):
                await task
        output = await controller.ask(SUM, ignore)
        model = controller.model
        await controller.close()
        return during, model, output.text

    assert asyncio.run(switch()) == (None, "demo", "7 + 5 = 12.")


def test_closing_ends_a_loading(controllers, monkeypatch):
    async def close():
        controller = controllers.Controller()
        with Gate(monkeypatch, controllers) as gate:
            task = asyncio.ensure_future(controller.switch("demo", None, ignore))
            await until(gate.reached.is_set, task)
            closing = asyncio.ensure_future(controller.close())
            await asyncio.sleep(0)
        await closing
        with pytest.raises(LoadCancelledError):
            await task
        with pytest.raises(LlmrsError, match="closing"):
            await controller.switch("demo", None, ignore)

    asyncio.run(close())


def test_a_task_that_is_cancelled_ends_its_loading(controllers, monkeypatch):
    async def cancel():
        controller = controllers.Controller()
        with Gate(monkeypatch, controllers) as gate:
            task = asyncio.ensure_future(controller.switch("demo", None, ignore))
            await until(gate.reached.is_set, task)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return gate

    assert asyncio.run(cancel()).steps == 1


def test_a_loading_ends_early_and_one_that_ended_too_late_is_given_back(controllers, monkeypatch):
    config, unwanted, seen = EngineConfig("demo", offline=True), threading.Event(), []

    def progress(done, total):
        seen.append(done / total)
        unwanted.set()

    with pytest.raises(LoadCancelledError):
        controllers.load(config, progress, unwanted)
    assert seen[-1] < 1

    def engine(*args, **options):
        loaded.append(Engine(*args, **options))
        unwanted.set()
        return loaded[-1]

    loaded = []
    unwanted.clear()
    monkeypatch.setattr(controllers, "Engine", engine)
    with pytest.raises(LoadCancelledError):
        controllers.load(config, ignore, unwanted)
    assert loaded
    assert not engine_threads()


def test_closing_ends_an_answer(controllers):
    async def close():
        controller, pieces = controllers.Controller(ENDLESS), []
        await controller.switch("demo", None, ignore)
        task = asyncio.ensure_future(controller.ask(SUM, pieces.append))
        await until(lambda: pieces, task)
        await controller.close()
        return await task

    assert asyncio.run(close()).finish_reason == "cancelled"


def test_the_old_engine_is_gone_before_the_new_one_comes(controllers, monkeypatch, copied):
    alive = []

    def engine(*args, **options):
        alive.append(len(engine_threads()))
        return Engine(*args, **options)

    monkeypatch.setattr(controllers, "Engine", engine)

    async def switch():
        controller = controllers.Controller()
        for model in ("demo", str(copied), "demo"):
            await controller.switch(model, None, ignore)
            assert controller.model == model
        await controller.close()

    asyncio.run(switch())
    assert alive == [0, 0, 0]


def test_a_budget_bounds_the_context(controllers):
    async def switch():
        controller = controllers.Controller(GREEDY)
        await controller.switch("demo", 500_000, ignore)
        small = controller.context
        await controller.switch("demo", None, ignore)
        whole = controller.context
        with pytest.raises(MemoryLimitError):
            await controller.switch("demo", 1, ignore)
        kept = controller.context
        await controller.close()
        return small, whole, kept, controller.context

    small, whole, kept, closed = asyncio.run(switch())
    assert 0 < small < whole == kept
    assert closed == 0


def test_a_broken_folder_brings_back_what_was_there(controllers, broken, tmp_path):
    async def switch():
        controller = controllers.Controller(GREEDY)
        with pytest.raises(ModelError):
            await controller.switch(str(broken), None, ignore)
        with pytest.raises(LlmrsError, match="no model is loaded"):
            await controller.ask(SUM, ignore)
        await controller.switch("demo", None, ignore)
        for folder in (broken, tmp_path / "nothing", tmp_path):
            with pytest.raises(ModelError):
                await controller.switch(str(folder), None, ignore)
        output = await controller.ask(SUM, ignore)
        await controller.close()
        return output.text

    assert asyncio.run(switch()) == "7 + 5 = 12."


def test_the_controller_needs_no_toga_and_importing_it_starts_nothing():
    code = """
import sys, threading
sys.modules["toga"] = None  # can't be imported
import llmrs_chat.controller
assert "torch" not in sys.modules and "mlx" not in sys.modules
assert threading.enumerate() == [threading.current_thread()]
"""
    path = f"import sys; sys.path.insert(0, {str(APP)!r})\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WATCHED = """
import asyncio, os, sys
from llmrs_chat.controller import Controller

outside = ("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess", "os.exec", "os.fork", "os.posix_spawn")
seen = []

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event.startswith(outside):
        seen.append((event, args[0]))

async def talk():
    controller = Controller()
    await controller.switch(sys.argv[1], None, lambda *_: None)
    await controller.ask("What is 7 + 5?", lambda text: None)
    await controller.close()

before = dict(os.environ)
sys.addaudithook(watch)
asyncio.run(talk())
assert dict(os.environ) == before
assert not seen, seen
open(os.devnull, "w").close()
assert seen  # the watch was awake
"""


def test_an_answer_needs_no_network_no_process_no_file_and_no_environment(copied):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(APP)!r})\n{WATCHED}", copied]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_project_names_what_is_there():
    project = tomllib.loads((APP / "pyproject.toml").read_text("utf-8"))
    app = project["tool"]["briefcase"]["app"]["llmrs-chat"]
    assert [(APP / source / "__main__.py").is_file() for source in app["sources"]] == [True]
    assert [(APP / requirement / "pyproject.toml").resolve() for requirement in app["requires"]] == [
        ROOT / "pyproject.toml"
    ]
    assert not [k for k in app["macOS"]["entitlement"] if "network" in k]


@pytest.fixture
def window(controllers, monkeypatch, tmp_path, capsys):
    """`window(check)` runs `await check(app)` in the app, and closes it; Toga prints what a handler raises."""
    pytest.importorskip("toga_dummy", reason="toga-dummy is not installed")
    monkeypatch.setenv("TOGA_BACKEND", "toga_dummy")
    monkeypatch.setenv("TOGA_DUMMY_HOME", str(tmp_path / "home"))
    import toga
    from llmrs_chat.app import ChatApp
    from toga_dummy.utils import EventLog

    async def run(check):
        app = ChatApp("Chat", "org.llmrs.chat")
        app.controller.sampling = GREEDY
        await until(lambda: app.view.send.enabled)
        await check(app)
        app.request_exit()
        await settled()
        assert EventLog.performed_actions(app, "exit")

    yield lambda check: asyncio.run(run(check))
    toga.App.app = None
    EventLog.reset()
    assert "Error in" not in capsys.readouterr().err


async def settled():
    """Waits for all that the app has started."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def ask(app, question=SUM):
    app.view.question.value = question
    app.view.send._impl.simulate_press()
    await settled()


async def open_folder(app, folder):
    app.main_window._impl.dialog_responses["SelectFolderDialog"] = [folder]
    app.view.open_folder._impl.simulate_press()
    await settled()


def enabled(view):
    names = ("send", "stop", "cancel", "models", "budgets", "open_folder", "new")
    return {name for name in names if getattr(view, name).enabled}


IDLE = {"send", "models", "budgets", "open_folder", "new"}


def test_a_question_is_answered_in_the_window(window):
    async def check(app):
        assert enabled(app.view) == IDLE
        await ask(app)
        assert app.view.conversation.value == f"You: {SUM}\n\nllmrs: 7 + 5 = 12.\n\n"
        assert "tokens/s" in app.view.status.text
        assert app.view.question.value == ""
        app.view.question.value = "Hello!"
        app.view.question._impl.simulate_confirm()
        await settled()
        assert app.view.conversation.value.count("llmrs: ") == 2
        app.view.new._impl.simulate_press()
        assert app.view.conversation.value == ""
        assert app.controller.messages == []

    window(check)


def test_the_answer_grows_and_stop_stops_it(window):
    async def check(app):
        app.controller.sampling = ENDLESS
        app.view.question.value = SUM
        app.view.send._impl.simulate_press()
        await until(lambda: "= 12." in app.view.conversation.value)
        assert enabled(app.view) == {"stop"}
        app.view.question.value = "Another?"
        app.view.question._impl.simulate_confirm()  # not now
        app.view.stop._impl.simulate_press()
        await settled()
        assert enabled(app.view) == IDLE
        assert "Another?" not in app.view.conversation.value
        app.controller.sampling = GREEDY
        app.view.new._impl.simulate_press()
        await ask(app)
        assert "7 + 5 = 12." in app.view.conversation.value

    window(check)


def test_models_are_switched(window, copied):
    async def check(app):
        await open_folder(app, copied)
        assert app.controller.model == str(copied)
        assert app.view.models.choice == str(copied)
        await ask(app)
        assert "7 + 5 = 12." in app.view.conversation.value
        app.view.models.choose("demo", "demo")
        await settled()
        assert app.controller.model == "demo"
        await open_folder(app, None)  # the user changed their mind
        assert app.controller.model == "demo"
        assert [row.name for row in app.view.models.items] == ["demo", "copied"]

    window(check)


def test_a_broken_folder_is_reported_and_the_old_model_answers(window, broken):
    async def check(app):
        await open_folder(app, broken)
        message, hint = app.view.problem.text.split("\nHint: ")
        assert message
        assert hint
        assert app.view.models.choice == app.controller.model == "demo"
        await ask(app)
        assert app.view.problem.text == ""
        assert "7 + 5 = 12." in app.view.conversation.value

    window(check)


def test_a_question_that_is_too_long_is_reported_and_kept(window):
    async def check(app):
        question = "long " * 5000
        await ask(app, question)
        assert "tokens" in app.view.problem.text
        assert "Hint: " in app.view.problem.text
        assert app.view.question.value == question.strip()
        assert enabled(app.view) == IDLE

    window(check)


def test_loading_shows_progress_and_is_cancelled(window, controllers, monkeypatch, copied):
    async def check(app):
        with Gate(monkeypatch, controllers):
            app.main_window._impl.dialog_responses["SelectFolderDialog"] = [copied]
            app.view.open_folder._impl.simulate_press()
            await until(lambda: 0 < app.view.progress.value < 1)
            assert enabled(app.view) == {"cancel"}
            app.view.cancel._impl.simulate_press()
        await settled()
        assert "cancelled" in app.view.problem.text
        assert app.controller.model == "demo"

    window(check)


def test_a_budget_is_used_and_remembered(window, controllers):
    async def choose(app):
        app.view.budgets.choose(64 * 10**6, "64 MB")
        await settled()
        assert app.controller.config.kv_cache_memory == 64 * 10**6
        assert (app.paths.config / "budget.txt").read_text("utf-8") == "64 MB"

    async def look(app):
        assert app.controller.config.kv_cache_memory == 64 * 10**6
        assert app.view.budgets.value.name == "64 MB"

    window(choose)
    window(look)


def test_closing_the_app_during_an_answer_ends_the_engine(window):
    async def check(app):
        app.controller.sampling = ENDLESS
        app.view.question.value = SUM
        app.view.send._impl.simulate_press()
        await until(lambda: "= 12." in app.view.conversation.value)
        assert engine_threads()

    window(check)
    assert not engine_threads()
