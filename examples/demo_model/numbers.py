"""Numbers without sums: comparing, counting, even and odd, order, numbers in words."""

from collections.abc import Callable
from random import Random

from demo_model.dialogue import Person, Turn
from demo_model.text import ask, capitalize, listed, number_words

LARGER = (
    "which is (larger|bigger|greater), {a} or {b}?",
    "what is (larger|bigger|greater|more), {a} or {b}?",
    "is {a} or {b} (larger|bigger|greater)?",
    "(tell me|find) the (larger|bigger|greater) (of|number of|one of) {a} and {b}.",
    "{a} or {b}, which is (larger|bigger|greater|more)?",
)
SMALLER = (
    "which is (smaller|less|lower), {a} or {b}?",
    "what is (smaller|less), {a} or {b}?",
    "is {a} or {b} smaller?",
    "(tell me|find) the smaller of {a} and {b}.",
    "{a} or {b}, which is (smaller|less)?",
)
IS_IT = "is {a} (larger|bigger|greater|more) than {b}?"
EVEN = ("is {n} (even|an even number)?", "{n}: is it even?", "is the number {n} even?")
ODD = ("is {n} (odd|an odd number)?", "is the number {n} odd?")
EITHER = ("is {n} (even or odd|odd or even|an even or an odd number)?", "{n}: even or odd?")
COUNT = (
    "count from {a} to {b}.",
    "count {a} to {b}.",
    "(can you|please) count from {a} to {b}[?|.]",
    "(list|give me|write|say|name) the numbers from {a} to {b}.",
    "count (up|on) from {a} to {b}.",
)
COUNT_TO = ("count to {b}.", "(can you|please) count to {b}[?|.]", "how do you count to {b}?")
COUNT_DOWN = ("count (down|backwards|back) from {a} to {b}.", "(can you|please) count down from {a} to {b}[?|.]")
AFTER = (
    "what (number |)comes after {n}?",
    "(which|what) number comes (next |right |)after {n}?",
    "what is the (next number|number) after {n}?",
)
BEFORE = (
    "what (number |)comes before {n}?",
    "which number comes (just |right |)before {n}?",
    "what is the number before {n}?",
)
IN_WORDS = ("(write|spell|say) {n} in words.", "how do you (write|spell|say) {n} in words?", "what is {n} in words?")
IN_DIGITS = ("(write|give me) {n} (in digits|as a number|with digits).", "what is {n} (in digits|as a number)?")
SORT = (
    "sort [the numbers ]{s}.",
    "(put|bring) {s} in order.",
    "sort these numbers: {s}.",
    "(order|arrange) the numbers {s}.",
    "can you sort {s}?",
)
LARGEST = ("(what|which) is the (largest|biggest|greatest) (of|number of) {s}?", "find the (largest|maximum) of {s}.")
SMALLEST = ("(what|which) is the smallest (of|number of) {s}?", "find the (smallest|minimum) of {s}.")
NEXT = ("what comes next: {s}?", "(continue|go on with) {s}.", "{s}, what (comes|is) next?", "continue the series {s}.")


def number(rng: Random) -> int:
    return rng.randint(0, rng.choice((10, 20, 100, 100, 1000)))


def compare(rng: Random) -> Turn:
    """Which of two numbers is larger or smaller."""
    a, b = number(rng), number(rng)
    b = rng.randint(0, 9) if a < 10 and rng.random() < 0.6 else b
    if rng.random() < 0.2:
        yes = a > b
        answer = (
            f"Yes, {a} is larger than {b}." if yes else f"No, {a} is {'equal to' if a == b else 'smaller than'} {b}."
        )
        return Turn(ask(rng, IS_IT, a=str(a), b=str(b)), answer, "Yes." if yes else "No.")
    larger = rng.random() < 0.6
    text = ask(rng, rng.choice(LARGER if larger else SMALLER), a=str(a), b=str(b))
    if a == b:
        return Turn(text, f"Neither: {a} and {b} are equal.")
    first, last = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    return Turn(text, f"{first} is {'larger' if larger else 'smaller'} than {last}.", f"{first}.")


def even(rng: Random) -> Turn:
    n = number(rng)
    kind = "odd" if n % 2 else "even"
    asked = rng.choice(("even", "odd", "either"))
    if asked == "either":
        return Turn(ask(rng, rng.choice(EITHER), n=str(n)), f"{n} is {kind}.", f"{kind.capitalize()}.")
    yes = "Yes" if kind == asked else "No"
    text = ask(rng, rng.choice(EVEN if asked == "even" else ODD), n=str(n))
    return Turn(text, f"{yes}, {n} is {kind}.", f"{yes}.")


def count(rng: Random) -> Turn:
    a = rng.randint(0, rng.choice((5, 10, 90)))
    b = a + rng.randint(2, 14)
    if rng.random() < 0.25:
        numbers = ", ".join(map(str, range(b, a - 1, -1)))
        return Turn(ask(rng, rng.choice(COUNT_DOWN), a=str(b), b=str(a)), f"{numbers}.")
    if rng.random() < 0.3:
        b = rng.randint(3, 20)
        return Turn(ask(rng, rng.choice(COUNT_TO), b=_either(rng, b)), f"{', '.join(map(str, range(1, b + 1)))}.")
    text = ask(rng, rng.choice(COUNT), a=_either(rng, a), b=_either(rng, b))
    return Turn(text, f"{', '.join(map(str, range(a, b + 1)))}.")


def _either(rng: Random, n: int) -> str:
    """A number in digits, or seldom in words."""
    return number_words(n) if n <= 100 and rng.random() < 0.15 else str(n)


def neighbour(rng: Random) -> Turn:
    n = rng.randint(1, rng.choice((10, 100, 100, 999)))
    if rng.random() < 0.6:
        return Turn(ask(rng, rng.choice(AFTER), n=_either(rng, n)), f"{n + 1} comes after {n}.", f"{n + 1}.")
    return Turn(ask(rng, rng.choice(BEFORE), n=_either(rng, n)), f"{n - 1} comes before {n}.", f"{n - 1}.")


def words(rng: Random) -> Turn:
    n = rng.randint(0, 100)
    if rng.random() < 0.6:
        return Turn(ask(rng, rng.choice(IN_WORDS), n=str(n)), f"{n} in words is {number_words(n)}.")
    return Turn(ask(rng, rng.choice(IN_DIGITS), n=number_words(n)), f"{capitalize(number_words(n))} is {n}.", f"{n}.")


def sort(rng: Random) -> Turn:
    """Three to five numbers in order, or the largest or smallest of them."""
    numbers = rng.sample(range(rng.choice((10, 20, 100))), rng.randint(3, 5))
    texts = list(map(str, numbers))
    s = rng.choice((", ".join(texts), " ".join(texts), listed(texts)))
    kind = rng.randrange(4)
    if kind == 0:
        return Turn(ask(rng, rng.choice(LARGEST), s=s), f"{max(numbers)} is the largest.", f"{max(numbers)}.")
    if kind == 1:
        return Turn(ask(rng, rng.choice(SMALLEST), s=s), f"{min(numbers)} is the smallest.", f"{min(numbers)}.")
    return Turn(ask(rng, rng.choice(SORT), s=s), f"In order: {', '.join(map(str, sorted(numbers)))}.")


def series(rng: Random) -> Turn:
    step, start = rng.choice((1, 1, 2, 2, 5, 10)), rng.randint(0, 20)
    start = start * step if step > 2 else start
    numbers = [start + step * i for i in range(6)]
    s = ", ".join(map(str, numbers[: rng.randint(3, 4)]))
    following = numbers[len(s.split(", ")) :][:3]
    return Turn(ask(rng, rng.choice(NEXT), s=s), f"Next come {listed(list(map(str, following)))}.", f"{following[0]}.")


KINDS: tuple[Callable[[Random], Turn], ...] = (compare, compare, even, count, count, neighbour, words, sort, series)


def numbers(rng: Random, person: Person) -> list[Turn]:
    """A question about numbers."""
    return [rng.choice(KINDS)(rng)]
