"""Words: opposites, spelling, letters, plurals, repetition."""

from collections.abc import Callable
from random import Random

from demo_model.dialogue import Person, Turn
from demo_model.text import VOWELS, article, ask, capitalize, made_up_word
from demo_model.world import ANIMALS, FOODS, OPPOSITES, PLURALS

PAIRS = [tuple(pair.split()) for pair in OPPOSITES.split(", ")]
PLAIN_WORDS = (
    "house tree water car book school river garden window door table chair friend mother father sister brother "
    "music paper stone light night morning summer winter flower bread sugar butter ship train road bridge city "
    "village hand head heart nose mouth finger shoe shirt coat hat clock letter number picture story song game "
    "ball king queen castle forest mountain island star moon sun cloud rain snow wind fire earth gold silver "
    "iron glass wood model token engine prompt answer question block cache graph happy green yellow purple "
    "seven eleven hello world computer keyboard language machine memory python kernel travel kitchen blanket "
    "pencil market doctor teacher "
).split()
WORDS = sorted({*PLAIN_WORDS, *ANIMALS, *(w for pair in PAIRS for w in pair), *(f for k in FOODS.values() for f in k)})
NOUNS = sorted({*PLAIN_WORDS[:90], *ANIMALS, *PLURALS})

OPPOSITE = (
    "(what is|what's|tell me|name|do you know) the opposite of {q}[?]",
    "opposite of {q}[?]",
    "the opposite of {q}[?| is]",
    "(what|which) word is the opposite of {q}?",
    "{q} is the opposite of what?",
    "(give me|say|find) the opposite of {q}.",
    "what (would be|could be) the opposite of {q}?",
)
SPELL = (
    "(spell|please spell|can you spell) [the word ]{q}[.|?]",
    "how (do you|do i|to|is) spell {q}?",
    "what is the spelling of [the word ]{q}?",
    "spell {q} for me.",
    "how is {q} (spelled|spelt|written)?",
)
LETTERS = (
    "how many letters (are in|does|has) [the word ]{q}[ have]?",
    "(count|number of) [the ]letters in [the word ]{q}.",
    "how long is the word {q}?",
)
FIRST = (
    "(what is|what's|tell me) the first letter of [the word ]{q}?",
    "(what|which) letter does {q} (begin|start) with?",
)
LAST = ("(what is|what's|tell me) the last letter of [the word ]{q}?", "(what|which) letter does {q} end with?")
PLURAL = (
    "(what is|what's|tell me) the plural of {q}?",
    "plural of {q}[?]",
    "what do you call more than one {w}?",
    "one {w}, two what?",
)
REPEAT = (
    "(repeat|say)[ after me]: {q}",
    "(please |)(repeat|say) {q}[.]",
    "(can you|could you) (repeat|say) {q}?",
    "repeat (the phrase|the words|this|the sentence|the word)[:] {q}",
    "say (the words|the word|this)[:] {q}",
    "(write|print|echo)[:] {q}",
    "repeat after me: {q}",
)
LETTER_AFTER = ("(what|which) letter comes after {x}[ in the alphabet]?", "what comes after {x} in the alphabet?")
REVERSED = (
    "(spell|write|say) {q} backwards.",
    "what is {q} (backwards|in reverse|reversed)?",
    "reverse [the word ]{q}.",
)
USE = ("(make|write|give me|form|build) a sentence with[ the word] {q}.", "use {q} in a sentence.")
ARTICLES = ("a", "the", "my", "our", "every", "this")
PHRASE_WORDS = (*PLAIN_WORDS, *ARTICLES, "and", "is", "in", "to", "not", "I", "you", "we", "red", "very", "good")


def quoted(rng: Random, word: str) -> str:
    """A word, sometimes in quotes."""
    mark = rng.choice(("", "", "", '"', '"', "'"))
    return f"{mark}{word}{mark}"


def cased(rng: Random, word: str) -> str:
    return capitalize(word) if rng.random() < 0.1 else word


def some_word(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.8:
        return rng.choice(WORDS)
    return made_up_word(rng, rng.choice((1, 2, 2, 3)))


def opposite(rng: Random) -> Turn:
    a, b = rng.choice(PAIRS)
    a, b = (a, b) if rng.random() < 0.5 or sum(b in pair for pair in PAIRS) > 1 else (b, a)
    first = next(y if a == x else x for x, y in PAIRS if a in (x, y))  # one answer for each word
    if rng.random() < 0.5:
        text = ask(rng, rng.choice(OPPOSITE).replace("{q}", a))
    else:
        text = ask(rng, rng.choice(OPPOSITE), q=quoted(rng, a))
    return Turn(text, f"The opposite of {a} is {first}.", f"{capitalize(first)}.")


def spell(rng: Random) -> Turn:
    word = some_word(rng)
    letters = "-".join(word.upper())
    return Turn(
        ask(rng, rng.choice(SPELL), keep=True, q=quoted(rng, cased(rng, word))), f"{capitalize(word)}: {letters}."
    )


def letters(rng: Random) -> Turn:
    """The number of letters of a word, its first or its last one."""
    word = some_word(rng)
    q = quoted(rng, word)
    kind = rng.randrange(3)
    if kind == 0:
        answer = f"{capitalize(word)} has {len(word)} letters: {'-'.join(word.upper())}."
        return Turn(ask(rng, rng.choice(LETTERS), q=q), answer.replace(" 1 letters", " 1 letter"), f"{len(word)}.")
    name, at, frames = ("first", 0, FIRST) if kind == 1 else ("last", -1, LAST)
    letter = word[at].upper()
    return Turn(ask(rng, rng.choice(frames), q=q), f"The {name} letter of {word} is {letter}.", f"{letter}.")


def plural_of(noun: str) -> str:
    """The plural by the table of exceptions, else by rule."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in VOWELS else noun + "s"


def plural(rng: Random) -> Turn:
    noun = rng.choice(NOUNS)
    found = plural_of(noun)
    text = ask(rng, rng.choice(PLURAL), q=quoted(rng, noun), w=noun)
    return Turn(text, f"The plural of {noun} is {found}.", f"{capitalize(found)}.")


def phrase(rng: Random) -> str:
    """Text to repeat: a sentence or random words."""
    draw = rng.random()
    if draw < 0.45:
        return sentence(rng)
    if draw < 0.6:
        return rng.choice(
            ("hello", "hello world", "good morning", "I love you", "thank you", "banana", "yes", "cheese")
        )
    words = [rng.choice(PHRASE_WORDS) if rng.random() < 0.85 else some_word(rng) for _ in range(rng.randint(1, 7))]
    words += [str(rng.randint(0, 999))] if rng.random() < 0.1 else []
    return " ".join(words)


def sentence(rng: Random, noun: str = "") -> str:
    """A simple sentence without full stop."""
    noun = noun or rng.choice(NOUNS)
    thing = rng.choice(NOUNS)
    start = rng.choice(("the", "my", "our", "this"))
    return f"{start} {noun} is {rng.choice(('near', 'behind', 'next to', 'far from'))} the {thing}"


def repeat(rng: Random) -> Turn:
    words = phrase(rng)
    text = ask(rng, rng.choice(REPEAT), keep=True, q=quoted(rng, cased(rng, words)))
    return Turn(text, f"{capitalize(words)}.")


def letter_after(rng: Random) -> Turn:
    at = rng.randrange(25)
    x, y = chr(65 + at), chr(66 + at)
    return Turn(ask(rng, rng.choice(LETTER_AFTER), x=x), f"{y} comes after {x}.", f"{y}.")


def backwards(rng: Random) -> Turn:
    word = rng.choice([w for w in WORDS if len(w) <= 5]) if rng.random() < 0.7 else made_up_word(rng, 2)
    text = ask(rng, rng.choice(REVERSED), q=quoted(rng, word))
    return Turn(text, f"{capitalize(word)} backwards is {'-'.join(word[::-1].upper())}.")


def use(rng: Random) -> Turn:
    noun = rng.choice(NOUNS)
    return Turn(ask(rng, rng.choice(USE), q=quoted(rng, noun)), f"I can see {article(noun)} in the picture.")


KINDS: tuple[Callable[[Random], Turn], ...] = (
    opposite, opposite, opposite, spell, spell, letters, letters, plural, repeat, repeat, letter_after, backwards, use,
)  # fmt: skip


def words(rng: Random, person: Person) -> list[Turn]:
    """A question about words."""
    return [rng.choice(KINDS)(rng)]
