"""Text tools of the corpus: templates, numbers in words, typing styles.

Template syntax: `(one|another)` is a choice, `[optional]` may be missing, `{slot}` is filled last, so that typing
mistakes do not change names, numbers and quoted words.
"""

import re
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import TypeAlias

Part: TypeAlias = "str | list[list[Part]]"  # text, or alternatives

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen "
).split()
TENS = ["_", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SMALL_WORDS = frozenset("a an the is are of me you can please does do in i it what whats tell for".split())
PREFIXES = (
    "hi, ",
    "hi! ",
    "hello, ",
    "hello! ",
    "hey, ",
    "please tell me: ",
    "ok, ",
    "okay. ",
    "so, ",
    "and ",
    "a question: ",
    "i have a question. ",
    "one more question: ",
    "quick question: ",
    "well, ",
    "now, ",
    "hmm, ",
    "sorry, ",
    "good morning! ",
    "cool. ",
    "thanks. ",
)
SUFFIXES = (" please", " thanks", " thank you", " please?", " i am curious.", " just asking.", " i need to know.")
VOWELS = "aeiou"
CONSONANTS = "bdfgklmnprstvz"


@cache
def parse(template: str) -> list[Part]:
    """A template as text and choices; slots stay in the text."""
    tokens = re.findall(r"[()\[\]|]|[^()\[\]|]+", template)[::-1]
    parsed = _alternatives(tokens)
    assert not tokens, f"unbalanced template: {template}"
    return parsed[0] if len(parsed) == 1 else [parsed]


def _alternatives(tokens: list[str]) -> list[list[Part]]:
    """Pops alternatives off `tokens` (the text, reversed) up to a closing bracket."""
    alternatives: list[list[Part]] = [[]]
    while tokens and tokens[-1] not in (")", "]"):
        token = tokens.pop()
        if token == "|":
            alternatives.append([])
        elif token in ("(", "["):
            inner = _alternatives(tokens)
            tokens.pop()
            alternatives[-1].append([*inner, []] if token == "[" else inner)
        else:
            alternatives[-1].append(token)
    return alternatives


def expand(rng: Random, template: str) -> str:
    """A random text of the template."""
    return _expand(rng, parse(template))


def _expand(rng: Random, parts: list[Part]) -> str:
    return "".join(p if isinstance(p, str) else _expand(rng, rng.choice(p)) for p in parts)


def ask(rng: Random, template: str, *, keep: bool = False, **slots: str) -> str:
    """What a user types: the template in a random typing style, with its slots filled.

    Slots are lowercased with the text unless `keep`.
    """
    text = expand(rng, template).strip()
    if rng.random() < 0.1:
        text = rng.choice(PREFIXES) + text
    if rng.random() < 0.04:
        text = text.rstrip("?.!") + rng.choice(SUFFIXES)
    text, lower = _typing_style(rng, text)
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value.lower() if lower and not keep else value)
    return text


def _typing_style(rng: Random, text: str) -> tuple[str, bool]:
    """The text in a random typing style, and whether that is lowercase."""
    draw = rng.random()
    if draw < 0.55:
        return capitalize(text.rstrip("?.!") if rng.random() < 0.1 else text), False
    if draw < 0.75:
        return _casual(rng, text), True
    if draw < 0.90:
        text = _mistype(rng, text)
        return (_casual(rng, text), True) if rng.random() < 0.6 else (capitalize(text), False)
    if draw < 0.97:
        return _casual(rng, _telegraphic(rng, text)), True
    return re.sub(r"(\{\w+\})|[a-z]+", lambda m: m[1] or m[0].upper(), text), False


def _casual(rng: Random, text: str) -> str:
    """Lowercase, without final punctuation."""
    text = text.rstrip("?.! ")
    text = re.sub(r"(\{\w+\})|[A-Z]+", lambda m: m[1] or m[0].lower(), text)
    return text.replace("'", "") if rng.random() < 0.5 else text


def _telegraphic(rng: Random, text: str) -> str:
    """Without some of the SMALL_WORDS."""
    words = [w for w in text.split(" ") if w.lower() not in SMALL_WORDS or rng.random() < 0.4]
    return " ".join(words) if words else text


def _mistype(rng: Random, text: str) -> str:
    """A typo in one or two words of at least four letters."""
    words = text.split(" ")
    candidates = [i for i, w in enumerate(words) if len(w) >= 4 and w.strip("?.!,").isalpha()]
    for i in rng.sample(candidates, min(len(candidates), rng.choice((1, 1, 2)))):
        words[i] = typo(rng, words[i])
    return " ".join(words)


def typo(rng: Random, word: str) -> str:
    """A word with two letters swapped, one missing, one twice, or one wrong."""
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[at + 1 :]


def capitalize(text: str) -> str:
    """Uppercase first letter."""
    return text[:1].upper() + text[1:]


def number_words(n: int) -> str:
    """A number from 0 to 199 in words: 42 is forty-two."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return "one hundred" + (f" and {number_words(n % 100)}" if n % 100 else "")


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" {last} {words[-1]}"


def article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return f"{'an' if noun[0].lower() in VOWELS else 'a'} {noun}"


def made_up_word(rng: Random, syllables: int = 2) -> str:
    """A pronounceable word without meaning."""
    word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))
    return word + rng.choice(("", "", rng.choice("nrsltk")))
