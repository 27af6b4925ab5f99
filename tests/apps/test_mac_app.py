"""The chat app for Macs on Toga's dummy backend, with the bundled model."""

import asyncio

import pytest
from mac_app import ENDLESS, GREEDY, SUM, Gate, engine_threads, until


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
    """Waits for the app's tasks."""
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
