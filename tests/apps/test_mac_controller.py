"""The controller of the chat app for Macs, with the bundled model."""

import asyncio
import subprocess
import sys
import threading
import tomllib

import pytest
from mac_app import APP, ENDLESS, GREEDY, SUM, Gate, engine_threads, ignore, until
from measure import ROOT

from llmrs import Engine, EngineConfig, LlmrsError, LoadCancelledError, MemoryLimitError, ModelError


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
