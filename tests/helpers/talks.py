"""Conversations, and chat templates written in the manner of the families' own, with a tokenizer for all of them."""

from pathlib import Path

import texts
import tokenizers

from llmrs.models.text.message import Message
from llmrs.models.text.template import ChatTemplate

SOURCES = {p.stem: p.read_text("utf-8") for p in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
BOS, EOS = "<|begin_of_text|>", "<|eot_id|>"
SPECIAL = [
    *(BOS, EOS, "<|start_header_id|>", "<|end_header_id|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁end｜>"),
]
OTHER = ["<think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Says what the "weather" is like,\nin °C & <b>words</b> \\ more',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Such as Zürich or 東京"},
                "days": {"type": "array", "items": {"type": "integer", "minimum": -1.5e-7}},
                "unit": {"enum": ["°C", "°F", None, True]},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def call(name, number, **arguments):
    return {"type": "function", "id": f"call0000{number}", "function": {"name": name, "arguments": arguments}}


SYSTEM = Message("system", "Be kind. \n")
ASK = Message("user", "  Hello, what is 7 + 5? é 😀\n")
TALK = [ASK, Message("assistant", " It is 12.\n"), Message("user", "And then?")]
CALLS = [
    Message("user", "How is it in Zürich?"),
    Message("assistant", "", tool_calls=[call("get_weather", 1, city="Zürich", days=[1, 2.5, None])]),
    Message("tool", '{"deg": 12}', tool_call_id="call00001", name="get_weather"),
]
TWO = [
    SYSTEM,
    CALLS[0],
    Message("assistant", "Let me see.", tool_calls=[call("get_weather", 1, city='"a"\\'), call("now", 2)]),
    Message("tool", "12 °C", tool_call_id="call00001", name="get_weather"),
    Message("tool", "noon", tool_call_id="call00002", name="now"),
]
THOUGHTS = [
    ASK,
    Message("assistant", "12", reasoning_content="\nseven and five\n"),
    Message("user", "Sure?"),
    Message("assistant", "Yes.", reasoning_content="I am"),
]
INLINE = [ASK, Message("assistant", "<think>\nseven\n</think>\n\n12"), Message("user", "Sure?")]
OPEN = [ASK, Message("assistant", "The answer is ")]

# name -> messages, and what goes with them
CONVERSATIONS = {
    "question": ([ASK], {}),
    "system": ([SYSTEM, ASK], {}),
    "turns": ([SYSTEM, *TALK], {}),
    "turns without a beginning": (TALK, {"add_generation_prompt": False}),
    "answered": (TALK[:2], {"add_generation_prompt": False}),
    "not alternating": ([ASK, ASK, SYSTEM], {}),
    "a role of its own": ([ASK, Message("narrator", "Silence.")], {}),
    "empty": ([Message("user", "")], {}),
    "no content": ([ASK, Message("assistant")], {}),
    "tools": ([SYSTEM, *TALK], {"tools": [WEATHER, CLOCK]}),
    "tools without system": ([ASK], {"tools": [CLOCK]}),
    "no tools": ([ASK], {"tools": []}),
    "called": (CALLS, {"tools": [WEATHER]}),
    "called and answered": (
        [*CALLS, Message("assistant", "It is 12 °C."), Message("user", "Thanks")], {"tools": [WEATHER]}
    ),
    "called twice": (TWO, {"tools": [WEATHER, CLOCK]}),
    "called without tools": (TWO, {}),
    "thoughts": (THOUGHTS, {"add_generation_prompt": False}),
    "thoughts in the text": (INLINE, {}),
    "continued": (OPEN, {"continue_final_message": True}),
    "continued without trailing space": ([*TALK, Message("assistant", "Then")], {"continue_final_message": True}),
    "continued from nothing": ([ASK, Message("assistant", "")], {"continue_final_message": True}),
    "continued question": ([SYSTEM, ASK], {"continue_final_message": True}),
    "continued thoughts": (THOUGHTS, {"continue_final_message": "reasoning_content"}),
    "nothing to continue": ([ASK, Message("assistant")], {"continue_final_message": True}),
}  # fmt: skip
VARIABLES = {
    "qwen3": [{"enable_thinking": False}, {"enable_thinking": True}],
    "llama31": [{"date_string": "1 Jan 2020"}, {"tools_in_user_message": False}],
    "controls": [{"limit": 2}],
}


def vocabulary():
    t = texts.byte_level()
    t.add_special_tokens(SPECIAL)
    t.add_tokens([tokenizers.AddedToken(o, special=False, normalized=False) for o in OTHER])
    return t


def chat_template(source):
    return ChatTemplate(source, {"bos": BOS, "eos": EOS}, Path("template"))


OURS = {name: chat_template(source) for name, source in SOURCES.items()}
