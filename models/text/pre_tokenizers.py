"""Pre-tokenizers of byte-level BPE by their names in GGUF files (`tokenizer.ggml.pre`).

The regular expressions are those of the models' tokenizer.json; names: src/llama-vocab.cpp of
github.com/ggml-org/llama.cpp. Each expression splits the pieces that the one before has left.

llama.cpp writes some of them otherwise, and its ids differ there: for tekken and gpt-4o it takes letters beyond ASCII
as both upper and lower case, and combining marks as symbols; for deepseek-llm and deepseek-coder it leaves the
Unicode spaces out of the range that is meant for Chinese.
"""

from typing import Any

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY_CASE = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]
_CASED = "".join(  # letters of alphabets with two cases, as DeepSeek LLM lists them
    "-".join(rf"\x{{{end}}}" for end in part.split("-"))
    for part in (
        "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A "
        "38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF "
        "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D "
        "1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 "
        "1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F "
        "2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F "
        "A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
        "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
    ).split()
)
_CJK = r"[一-龥ࠀ-一가-퟿]+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = "|".join([_CONTRACTION, _WORDS, r"\p{N}{1,3}", _SYMBOLS, _SPACES])
QWEN2 = "|".join([_CONTRACTION, _WORDS, r"\p{N}", _SYMBOLS, _SPACES])
QWEN35 = "|".join(
    [_CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES]
)
TEKKEN = "|".join([*_ANY_CASE, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES])
GPT4O = "|".join(
    [*(f"{case}{_CONTRACTION}?" for case in _ANY_CASE), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES]
)
DEEPSEEK3 = "|".join([
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*", _SPACES,
])  # fmt: skip
NO_PUNCTUATION = r" ?[^(\s|.,!?…。，、।۔،)]+"
SPLITS = {
    "gpt-2": [GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "digits": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "qwen35": [QWEN35],
    "tekken": [TEKKEN],
    "gpt-4o": [GPT4O],
    "deepseek-llm": ["[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+"],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"],
    "minicpm5": [r"\p{N}{1,3}", "|".join([_CONTRACTION, _WORDS, r"\p{N}+", _SYMBOLS, _SPACES])],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3],
    "bloom": [NO_PUNCTUATION],
    "viking": [NO_PUNCTUATION, r"\p{N}"],
    "seed-coder": ["|".join([_CONTRACTION, _WORDS, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])],
    "bailingmoe": ["|".join([
        r"'(?i:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r"\s*[\r\n]", r"\s+(?!\S)", r"\s+",
    ])],
}  # fmt: skip
NAMES = {
    **{name: name for name in SPLITS if name != "digits"},
    **dict.fromkeys(("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion",
                     "granite-docling"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"),
                    "digits"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe",
                     "glm4", "chatglm-bpe"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
                    "qwen2"),
    **dict.fromkeys(("llama4", "kanana2", "minimax-m2", "talkie"), "gpt-4o"),
    **dict.fromkeys(("hunyuan-dense", "joyai-llm"), "deepseek-v3"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
    **dict.fromkeys(("bailingmoe2", "llada-moe"), "bailingmoe"),
}  # fmt: skip
ADD_BOS = {  # where the file does not say
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken",
}  # fmt: skip
IGNORE_MERGES = ADD_BOS | {"minicpm5"}  # words of the vocabulary are taken whole


def pre_tokenizer(name: str) -> dict[str, Any]:
    """The `pre_tokenizer` of tokenizer.json. Raises KeyError for an unknown name."""
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps: list[dict[str, Any]] = [{**split, "pattern": {"Regex": pattern}} for pattern in SPLITS[NAMES[name]]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level]}
