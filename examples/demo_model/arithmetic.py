"""Arithmetic questions, and the held-out pairs.

Sums of 0..100 and differences of the same, times tables to 12 and their divisions. A pair is held out in both
orders, and for each of + and - by itself.
"""

import zlib
from random import Random

from demo_model.dialogue import Person, Turn
from demo_model.text import ask, capitalize, expand, number_words

LARGEST = 100  # operand of a sum
TABLE = 12  # largest factor
SIGNS = {"+": ("+", "+", " plus "), "-": ("-", "-", "−"), "*": ("*", "x", "×"), "/": ("/", ":", "÷")}
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}

WHAT = (
    "what is {s}?",
    "what is {s}?",
    "what's {s}?",
    "whats {s}",
    "how much is {s}?",
    "{s}?",
    "{s}",
    "{s} =",
    "{s} = ?",
    "(calculate|compute|work out|solve|evaluate) {s}[ for me].",
    "(tell me|do you know|i need to know) (what {s} is|{s}).",
    "(can|could) you (calculate|tell me|work out|do) {s}?",
    "what (does {s} equal|is the result of {s}|do you get for {s}|is the answer to {s})?",
    "{s} is what?",
    "{s} equals?",
    "what does {s} make?",
)
PHRASES = {
    "+": (
        "add {a} and {b}.",
        "add {a} to {b}.",
        "(sum|sum up) {a} and {b}.",
        "what is the sum of {a} and {b}?",
        "what do you get (when|if) you add {a} (and|to) {b}?",
        "the sum of {a} and {b}[?]",
        "(can you|please) add {a} and {b}[?|.]",
        "what is {a} and {b} together?",
        "what is {b} more than {a}?",
    ),
    "-": (
        "subtract {b} from {a}.",
        "take {b} (away )from {a}.",
        "what do you get (when|if) you (subtract|take) {b} from {a}?",
        "(can you|please) subtract {b} from {a}[?|.]",
        "what is {b} less than {a}?",
        "{a} take away {b}[?]",
        "how much is left (when|if) you take {b} from {a}?",
    ),
    "*": (
        "multiply {a} (by|with|and) {b}.",
        "what is the product of {a} and {b}?",
        "what is {a} multiplied by {b}?",
        "(can you|please) multiply {a} (by|with) {b}[?|.]",
        "what do you get (when|if) you multiply {a} (by|with) {b}?",
    ),
    "/": (
        "divide {a} by {b}.",
        "what is {a} (over|split into) {b}?",
        "(can you|please) divide {a} by {b}[?|.]",
        "how many times does {b} go into {a}?",
        "what do you get (when|if) you divide {a} by {b}?",
    ),
}
AGAIN = ("and {s}?", "what about {s}?", "and what is {s}?", "now {s}", "ok, and {s}?", "{s}?", "how about {s}?", "{s}")
GO_ON = {
    "+": ("(now |and |then |)add {b}.", "plus {b}?", "and {b} more?", "add {b} to that."),
    "-": ("(now |and |then |)(subtract|take away) {b}.", "minus {b}?", "take {b} from that."),
}
TOO_BIG = "These numbers are too big for me. I can add and subtract numbers up to 100, and multiply up to 12 times 12."
NO_FRACTIONS = "I can only do sums with whole numbers."
NO_ZERO = "Nobody can divide by zero."


def result(op: str, a: int, b: int) -> int:
    """a op b; for "/" the division must be exact."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[op]


def held_out(op: str, a: int, b: int) -> bool:
    """Whether a pair is a test pair: one in ten, in either order."""
    return op in "+-" and zlib.crc32(f"{min(a, b)}{op}{max(a, b)}".encode()) % 10 == 0


def operands(rng: Random, op: str) -> tuple[int, int]:
    """A training pair."""
    if op in "*/":
        a, b = rng.randint(0, TABLE), rng.randint(0, TABLE)
        return (a, b) if op == "*" else (a * max(b, 1), max(b, 1))
    while True:
        top = 20 if rng.random() < 0.15 else LARGEST
        a, b = rng.randint(0, top), rng.randint(0, top)
        if op == "-" and a < b and rng.random() < 0.35:
            a, b = b, a
        if not held_out(op, a, b):
            return a, b


def spell(rng: Random, n: int) -> str:
    words = number_words(n)
    return words.replace("-", " ") if rng.random() < 0.3 else words


def sum_answer(op: str, a: int, b: int, spoken: bool) -> str:
    """The answer: `7 + 5 = 12.`, or `7 plus 5 is 12.` to a spoken question."""
    c = result(op, a, b)
    return f"{a} {WORDS[op]} {b} is {c}." if spoken else f"{a} {op} {b} = {c}."


def sum_question(rng: Random, op: str, a: int, b: int, frames: tuple[str, ...] = WHAT) -> tuple[str, bool]:
    """A question for a op b, and whether the operator is spelled out."""
    if frames is WHAT and rng.random() < 0.3:
        spelled = rng.random() < 0.4
        left, right = (spell(rng, n) if spelled else str(n) for n in (a, b))
        return ask(rng, rng.choice(PHRASES[op]), a=left, b=right), False
    if rng.random() < 0.45:
        spelled = rng.random() < 0.55
        left, right = (spell(rng, n) if spelled else str(n) for n in (a, b))
        return ask(rng, rng.choice(frames), s=f"{left} {WORDS[op]} {right}"), True
    sign = rng.choice(SIGNS[op]).strip()
    if sign == "plus":
        return ask(rng, rng.choice(frames), s=f"{a} plus {b}"), True
    space = "" if rng.random() < 0.3 else " "
    return ask(rng, rng.choice(frames), s=f"{a}{space}{sign}{space}{b}"), False


def one_sum(rng: Random, op: str, frames: tuple[str, ...] = WHAT) -> tuple[Turn, int]:
    a, b = operands(rng, op)
    question, spoken = sum_question(rng, op, a, b, frames)
    c = result(op, a, b)
    return Turn(question, sum_answer(op, a, b, spoken), f"{c}."), c


def sums(rng: Random, person: Person) -> list[Turn]:
    """A sum, sometimes with a second one, which may start from its result."""
    turn, c = one_sum(rng, rng.choice("+++---**/"))
    turns = [turn]
    if rng.random() < 0.15:
        turns.append(one_sum(rng, rng.choice("++--*/"), AGAIN)[0])
    elif rng.random() < 0.1 and 0 <= c <= LARGEST:
        turns += _further(rng, c)
    return turns


def _further(rng: Random, a: int) -> list[Turn]:
    op, b = rng.choice("+-"), rng.randint(1, 20)
    if held_out(op, a, b):
        return []
    return [Turn(ask(rng, rng.choice(GO_ON[op]), b=str(b)), sum_answer(op, a, b, False), f"{result(op, a, b)}.")]


def odd_sums(rng: Random, person: Person) -> list[Turn]:
    """Other sums: three numbers, squares, halves, negative results, remainders, impossible ones."""
    kinds = (_three, _three, _square, _half, _negative, _remainder, _story, _story, _story, _story, _refused, _refused)
    return [rng.choice(kinds)(rng)]


def _three(rng: Random) -> Turn:
    a, b, c = (rng.randint(0, 10) for _ in range(3))
    space = rng.choice((" ", " ", ""))
    s = f"{space}+{space}".join(map(str, (a, b, c)))
    return Turn(ask(rng, rng.choice(WHAT), s=s), f"{a} + {b} + {c} = {a + b + c}.", f"{a + b + c}.")


def _square(rng: Random) -> Turn:
    a = rng.randint(0, TABLE)
    frame = "(what is|calculate|how much is) ({a} squared|the square of {a}|{a} times itself)?"
    return Turn(ask(rng, frame, a=str(a)), f"{a} * {a} = {a * a}.", f"{a * a}.")


def _half(rng: Random) -> Turn:
    if rng.random() < 0.5:
        a = rng.randint(0, 50)
        frame = "what is (half of|half|the half of) {n}?"
        return Turn(ask(rng, frame, n=str(2 * a)), f"Half of {2 * a} is {a}.", f"{a}.")
    a = rng.randint(0, 50)
    frame = "(what is|how much is) (twice|double|two times|the double of) {n}?"
    return Turn(ask(rng, frame, n=str(a)), f"Twice {a} is {2 * a}.", f"{2 * a}.")


def _negative(rng: Random) -> Turn:
    a, b, op = -rng.randint(1, 20), rng.randint(0, 20), rng.choice("+-")
    space = rng.choice((" ", " ", ""))
    c = result(op, a, b)
    return Turn(ask(rng, rng.choice(WHAT), s=f"{a}{space}{op}{space}{b}"), f"{a} {op} {b} = {c}.", f"{c}.")


def _remainder(rng: Random) -> Turn:
    b = rng.randint(2, 10)
    a = b * rng.randint(1, 9) + rng.randint(1, b - 1)
    sign = rng.choice((" / ", " divided by ", "/", " ÷ "))
    answer = f"{a} divided by {b} is {a // b}, with a remainder of {a % b}."
    return Turn(ask(rng, rng.choice(WHAT), s=f"{a}{sign}{b}"), answer)


THINGS = "apples books pens cats eggs coins balls cakes stones hats friends dogs cookies".split()
GAIN = (
    "i have {a} {t} and (get|buy|find|take) {b} more. how many {t} do i have[ now]?",
    "there are {a} {t}. {b} more come. how many {t} are there[ now]?",
    "{p} has {a} {t} and gets {b} more. how many {t} does {p} have[ now]?",
    "if i have {a} {t} and you give me {b}, how many {t} do i have?",
    "i have {a} {t}. {p} gives me {b} more. how many {t} do i have[ now]?",
)
LOSS = (
    "i have {a} {t} and (lose|sell|give away) {b}. how many {t} do i have[ now]?",
    "i have {a} {t}. {p} takes {b} of them. how many {t} are left?",
    "{p} has {a} {t} and loses {b}. how many {t} does {p} have[ now]?",
    "there are {a} {t}. {b} go away. how many {t} are left?",
    "if i have {a} {t} and give you {b}, how many {t} do i have[ left]?",
)
WHO = ["Anna", "Tom", "Ben", "Lisa", "Sam", "Mia", "Paul", "Eva", "Max", "Nina"]


def _story(rng: Random) -> Turn:
    gain, t, p = rng.random() < 0.5, rng.choice(THINGS), rng.choice(WHO)
    while True:
        a, b = rng.randint(2, 20), rng.randint(2, 10)
        if not held_out("+" if gain else "-", a, b) and (gain or a - b >= 2):
            break
    template = expand(rng, rng.choice(GAIN if gain else LOSS))
    c = a + b if gain else a - b
    subject = f"{p} has" if "does {p}" in template else "You have" if "i have" in template[-22:] else "There are"
    text = ask(rng, template, a=str(a), b=str(b), t=t, p=p)
    return Turn(text, f"{subject} {c} {t}, because {a} {'+' if gain else '-'} {b} = {c}.", f"{c}.")


def _refused(rng: Random) -> Turn:
    kind = rng.randrange(8)
    if kind == 0:
        s = f"{rng.randint(0, 99)}{rng.choice((' / ', '/', ' divided by '))}0"
        return Turn(ask(rng, rng.choice(WHAT), s=s), NO_ZERO)
    if kind == 1:
        s = f"{rng.uniform(0, 99):.{rng.randint(1, 2)}f} {rng.choice('+-*/')} {rng.uniform(0, 99):.1f}"
        return Turn(ask(rng, rng.choice(WHAT), s=s), NO_FRACTIONS)
    op = rng.choice("++-**")
    digits = rng.randint(3, 6)
    a = rng.randint(max(101, 10 ** (digits - 1)), 10**digits)
    b = rng.randint(13, 10 ** rng.randint(2, digits))
    if op == "*" and rng.random() < 0.6:
        a, b = rng.randint(13, 99), rng.randint(13, 99)
    elif rng.random() < 0.3:
        a, b = b, a
    sign = rng.choice((f" {op} ", f" {op} ", op, f" {WORDS[op]} "))
    return Turn(capitalize(ask(rng, rng.choice(WHAT), s=f"{a}{sign}{b}")), TOO_BIG)
