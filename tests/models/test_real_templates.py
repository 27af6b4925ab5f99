"""Chat templates of public models render as in transformers, or fail where it fails."""

from pathlib import Path

import jinja2
import pytest
from transformers.utils import chat_template_utils

from llmrs.core.errors import RequestError
from llmrs.models.text.template import ChatTemplate

pytestmark = pytest.mark.usefixtures("frozen_time")

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "templates"
PATHS = {p.stem: p for p in sorted(FOLDER.glob("*.jinja"))}
if not PATHS:
    pytest.skip(f"the templates of public models are not in {FOLDER}", allow_module_level=True)
SPECIALS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "sep": None, "cls": None, "mask": None}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def called(content, arguments):
    function = {"name": "count", "arguments": arguments}
    return said("assistant", content, tool_calls=[{"type": "function", "id": "call00001", "function": function}])


def answered(content):
    return said("tool", content, tool_call_id="call00001", name="count")


def parts(*texts):
    return [{"type": "text", "text": t} for t in texts]


ASK = said("user", "  How many?\n")
NUMBERS = {
    "population": 2_100_000,
    "when": 1732752000,
    "wide": 2**70,
    "negative": -12345678,
    "float": 1234567.875,
    "huge": 1e300,
    "tiny": -1.5e-7,
    "nested": {"a": [10**12, -0.0, None, True]},
}
COUNT = {
    "type": "function",
    "function": {
        "name": "count",
        "description": "Counts",
        "parameters": {
            "type": "object",
            "properties": {
                "population": {"type": "integer", "maximum": 1_000_000, "minimum": -(2**63), "default": 123456},
                "items": {
                    "type": "array",
                    "maxItems": 50_000,
                    "items": {
                        "type": "object",
                        "properties": {"x": {"exclusiveMaximum": 1e25, "enum": [10_001, 2**64, -0.5]}},
                    },
                },
            },
            "required": ["population"],
        },
    },
}
TALKS = {
    "question": [ASK],
    "turns": [said("system", "Be kind."), ASK, said("assistant", "12 <b>é 東京 😀</b>"), said("user", "And?  ")],
    "called": [ASK, called("", NUMBERS), answered('{"n": 2100000}'), said("assistant", "2,100,000."), ASK],
    "called with words": [said("system", "Be kind."), ASK, called("Let me see.", NUMBERS), answered("2100000")],
    "called with a text": [ASK, called("", '{"when": 1732752000}'), answered("-1e300")],
    "thoughts": [ASK, said("assistant", "12", reasoning_content="seven"), ASK, said("assistant", "Yes", reasoning="I")],
}
NONE = {
    "none": [ASK, called(None, NUMBERS), answered("2100000")],
    "none with a text": [ASK, called(None, '{"when": 1732752000}'), answered("2100000")],
}
PARTS = {
    "parts": [said("system", parts("Be kind.")), said("user", parts("Hello, ", "you")), said("assistant", parts("Hi"))],
    "parts of a question": [said("user", parts("Hello, ", "you"))],
    "parts of a result": [ASK, called("", NUMBERS), answered(parts("2100000"))],
}

# Where ours differ from what is given to transformers' renderer, and why

# They fail on a content that is None, or write "None" before the call. Ours leaves it out for them, as
# apply_chat_template of transformers does for all; templates that ask for it (DeepSeek, Kimi) see None. Where that
# would lose the call (Qwen2.5-VL, which knows no calls), ours are refused as transformers' renderer fails.
NO_NONE = """
e2e_LiquidAI_LFM2.5-VL-450M e2e_blenderbot e2e_blenderbot_small e2e_bloom e2e_gpt2
e2e_gpt_neox e2e_maywell_PiVoT-MoE e2e_maywell_Synatra-Mixtral-8x7B e2e_meta-llama_Llama-3.2-11B-Vision-Instruct
e2e_whisper e2e_zai-org_GLM-5.1 npm_llama3_1 trl_cohere2 trl_glm4moe trl_gptoss trl_lfm2_2_5 trl_llama3
trl_qwen3_vl
""".split()

# They fail on a list of parts, write it as Python does, or leave it out. Ours joins the texts for them.
TEXT_ONLY = """
cz_alpaca cz_amberchat cz_chatml cz_chatqa cz_falcon-instruct cz_gemma-it cz_granite-3.0-instruct cz_llama-2-chat
cz_llama-3-instruct cz_mistral-instruct cz_openchat-3.5 cz_phi-3-small cz_phi-3 cz_qwen2.5-instruct cz_saiga
cz_solar-instruct cz_vicuna cz_zephyr e2e_CISCai_Mistral-7B-Instruct-v0.3-SOTA-GGUF
e2e_CohereLabs_c4ai-command-a-03-2025 e2e_Deci_DeciLM-7B-instruct
e2e_HuggingFaceH4_zephyr-7b-beta_add_generation_prompt=false
e2e_HuggingFaceH4_zephyr-7b-beta_add_generation_prompt=true e2e_HuggingFaceH4_zephyr-7b-gemma-v0.1
e2e_HuggingFaceTB_SmolLM3-3B e2e_MadeAgents_Hammer2.1 e2e_NousResearch_Hermes-2-Pro-Llama-3-8B_JSON_Schema
e2e_Qwen_Qwen1.5-72B-Chat e2e_Qwen_Qwen2.5-7B-Instruct e2e_Qwen_Qwen3-0.6B
e2e_TheBloke_Mistral-7B-Instruct-v0.1-GPTQ e2e_TheBloke_deepseek-coder-33B-instruct-AWQ e2e__base
e2e_abacusai_Smaug-34B-v0.1 e2e_ai21labs_AI21-Jamba-Large-1.6 e2e_blenderbot e2e_blenderbot_small e2e_bloom
e2e_codellama_CodeLlama-70b-Instruct-hf e2e_cognitivecomputations_dolphin-2.5-mixtral-8x7b
e2e_deepseek-ai_DeepSeek-R1 e2e_deepseek-ai_deepseek-coder-33b-instruct e2e_deepseek-ai_deepseek-llm-7b-chat
e2e_ericzzz_falcon-rw-1b-chat e2e_gpt2 e2e_gpt_neox e2e_h2oai_h2o-danube-1.8b-chat e2e_internlm_internlm2-chat-7b
e2e_llama e2e_maywell_PiVoT-MoE e2e_maywell_Synatra-Mixtral-8x7B e2e_meetkai_functionary-medium-v2.2
e2e_meta-llama_Llama-3.1-8B-Instruct e2e_meta-llama_Llama-3.2-11B-Vision-Instruct
e2e_mistralai_Mistral-7B-Instruct-v0.3_JSON_Schema e2e_mistralai_Mistral-Nemo-Instruct-2407
e2e_mistralai_Mixtral-8x7B-Instruct-v0.1 e2e_openbmb_MiniCPM3-4B e2e_openchat_openchat-3.5-0106
e2e_upstage_SOLAR-10.7B-Instruct-v1.0 e2e_whisper minja_qwen3coder npm_llama3_1 npm_qwen3 trl_cohere trl_cohere2
trl_deepseekv3 trl_gemma trl_glm4moe trl_gptoss trl_lfm2 trl_llama3 trl_llama3_1 trl_llama3_2 trl_nemotron_3_nano
trl_nemotron_3_super trl_nemotron_3_ultra trl_phi3 trl_phi3_5 trl_qwen2_5 trl_qwen3 trl_qwen3_instruct_2507
""".split()


@pytest.fixture(scope="module")
def ours():
    return {name: ChatTemplate(path.read_text("utf-8"), SPECIALS, path) for name, path in PATHS.items()}


def theirs(template, messages, options):
    """transformers' text; None if the template fails."""
    tokens = {f"{name}_token": text for name, text in SPECIALS.items() if text is not None}
    given = {"chat_template": template.source, **tokens, **options}
    try:
        return chat_template_utils.render_jinja_template([messages], **given)[0][0]
    except (jinja2.TemplateError, ValueError, TypeError, LookupError):
        return None


def rendered(template, messages, options):
    try:
        return template.render(messages, **options)
    except RequestError:
        return None


def options_for(template):
    """With and without generation prompt and, if supported, a tool."""
    tools = {"tools": [COUNT]} if "tools" in template.variables else {}
    return [{"add_generation_prompt": True, **tools}, {"add_generation_prompt": False}]


def as_text(messages):
    """Without the features that text-only templates lack."""
    told = [m if not isinstance(m["content"], list) else {**m, "content": join(m["content"])} for m in messages]
    return [{k: v for k, v in m.items() if v is not None} for m in told]


def join(content):
    return "".join(part["text"] for part in content)


@pytest.mark.parametrize("name", PATHS)
def test_real_templates_equal_transformers(name, ours):
    for messages in TALKS.values():
        for options in options_for(ours[name]):
            assert rendered(ours[name], messages, options) == theirs(ours[name], messages, options)


@pytest.mark.parametrize(("talks", "different"), [(NONE, NO_NONE), (PARTS, TEXT_ONLY)], ids=["none", "parts"])
@pytest.mark.parametrize("name", PATHS)
def test_contents_that_are_no_text(name, talks, different, ours):
    differences = 0
    for messages in talks.values():
        for options in options_for(ours[name]):
            given, text = (theirs(ours[name], m, options) for m in (messages, as_text(messages)))
            wrong = name in different and text is not None and is_wrong(given, text)
            assert rendered(ours[name], messages, options) == (text if wrong else given)
            differences += wrong
    assert bool(differences) == (name in different)


def is_wrong(given, text):
    """Whether transformers fails, writes Python reprs, or drops content."""
    return given is None or "None" in given or "{'type': 'text'" in given or len(given) < len(text)


def test_what_is_covered(ours):
    accepted = [sum(theirs(t, m, {}) is not None for m in TALKS.values()) for t in ours.values()]
    numbers = [theirs(t, TALKS["called"], {}) or "" for t in ours.values()]
    assert sum(count >= 3 for count in accepted) > 0.9 * len(accepted) >= 90
    assert sum("1180591620717411303424" in text for text in numbers) >= 30
