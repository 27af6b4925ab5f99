"""Questions and answers about the tables of world.py."""

from collections.abc import Callable
from random import Random

from demo_model.dialogue import Person, Turn
from demo_model.text import article, ask, capitalize, listed, made_up_word, number_words
from demo_model.world import (
    ANIMALS,
    CAPITALS,
    COLOURS,
    DAYS,
    FLY,
    FOODS,
    MIXTURES,
    MONTH_DAYS,
    MONTHS,
    NICKNAMES,
    ORDINALS,
    PLURALS,
    SEASONS,
    SWIM,
)

CAPITAL = (
    "(what is|what's|name|tell me|do you know|what city is) the capital[ city] of {c}[?]",
    "(which|what) city is the capital of {c}?",
    "what is {c}'s capital?",
    "capital of {c}[?]",
    "the capital of {c}[?|, please]",
    "(can|could) you (tell me|name) the capital of {c}?",
    "what (capital does {c} have|is the main city of {c})?",
    "{c} capital",
)
AND_OF = ("and (of |)(the capital of |){c}?", "what about {c}?", "and {c}?", "how about {c}?", "{c}?")
WHICH = (
    "(which|what) country (has the capital {c}|is {c} the capital of|is {c} in)?",
    "{c} is the capital of (which|what) country?",
    "where is {c}?",
    "in (which|what) country is {c}?",
)
WHERE = ("where is {c}?", "(on|in) (which|what) continent is {c}?", "(which|what) continent is {c} (in|on)?")
SAYS = (
    "what (sound|noise) does {a} make?",
    "what does {a} say?",
    "how does {a} (sound|go)?",
    "(make|do) the sound of {a}.",
)
WHO_SAYS = ("(which|what) animal (says|goes) {s}?", "(which|what) animal makes the (sound|noise) {s}?", "who says {s}?")
LEGS = ("how many legs does {a} have?", "how many legs has {a}?", "(count|number of) the legs of {a}.")
YOUNG = (
    "what is (a baby {n}|the baby of {a}|the young of {a}|a young {n}) called?",
    "(how|what) do you call a (baby|young) {n}?",
    "what is the name of a baby {n}?",
)
LIVES = ("where (does {a} live|do {p} live|can i find {a})?", "(what|which) is the home of {a}?")
EATS = ("what (does {a}|do {p}) (eat|like to eat)?", "what is the food of {a}?", "what should i feed {a}?")
ABOUT = (
    "tell me (something|a fact|an interesting fact|a fun fact) about {p}.",
    "what do you know about {p}?",
    "tell me about {p}.",
    "what is special about {p}?",
    "(tell me about|what is) {a}[?]",
    "do you know {p}?",
)
FACT = (
    "tell me (a fact|a fun fact|something interesting|an interesting fact|something new|something).",
    "(do you know|give me) (a fun fact|an interesting fact|a fact)[?|.]",
    "say something interesting.",
    "(teach me something|surprise me).",
    "a fun fact[, please].",
    "tell me something about (animals|nature).",
)
COLOUR = (
    "(what|which) (colour|color) (is|has) {t}?",
    "what is the (colour|color) of {t}?",
    "tell me the (colour|color) of {t}.",
    "of (what|which) (colour|color) is {t}?",
    "{t}, what (colour|color) is it?",
)
MIX = (
    "what (colour|color) do (you get|i get) (when|if) (you|i) mix {a} and {b}?",
    "what do {a} and {b} (make|give)?",
    "(mix|blend) {a} and {b}.",
    "what (colour|color) (is|gives|comes from) {a} (and|plus|mixed with) {b}?",
)
FOOD = ("is {f} a {k}?", "is {f} a (kind of |){k}?", "would you call {f} a {k}?")
NAME_FOODS = ("(name|list|tell me|give me) (three|some|a few) {k}s.", "(which|what) {k}s do you know?", "name a {k}.")
DAY_AFTER = ("(what|which) day (comes|is) after {d}?", "what is the day after {d}?", "(today is {d}|it is {d} today). "
             "what day is tomorrow?", "if today is {d}, what is tomorrow?")  # fmt: skip
DAY_BEFORE = ("(what|which) day (comes|is) before {d}?", "what is the day before {d}?", "today is {d}. what day was "
              "yesterday?")  # fmt: skip
MONTH_AFTER = ("(what|which) month (comes|is) after {m}?", "what is the (next month|month) after {m}?")
MONTH_BEFORE = ("(what|which) month (comes|is) before {m}?", "what is the month before {m}?")
MONTH_LENGTH = ("how many days (does {m} have|are in {m}|has {m})?", "how long is {m}?")
MONTH_NUMBER = ("(what|which) is the {o} month[ of the year]?", "(name|tell me) the {o} month.")
SEASON_AFTER = ("(what|which) season (comes|is) after {s}?", "what comes after {s}?")
LISTS = (
    ("(list|name|tell me|say|what are) the days of the week[.|?]", "The days are " + listed(DAYS) + "."),
    ("(list|name|tell me|say|what are) the months[ of the year][.|?]", "The months are " + listed(MONTHS) + "."),
    ("(list|name|tell me|what are) the [four ]seasons[.|?]", "The seasons are spring, summer, autumn and winter."),
    ("how many (days are in a week|days does a week have)?", "A week has 7 days."),
    ("how many (months are in a year|months does a year have)?", "A year has 12 months."),
    ("how many (days are in a year|days does a year have)?", "A year has 365 days, and a leap year has 366."),
    ("how many (hours are in a day|hours does a day have)?", "A day has 24 hours."),
    ("how many minutes (are in an hour|does an hour have)?", "An hour has 60 minutes."),
    ("how many seconds (are in a minute|does a minute have)?", "A minute has 60 seconds."),
    ("how many seasons are there?", "There are four seasons: spring, summer, autumn and winter."),
    ("(list|name|tell me|what are) the (colours|colors) of the rainbow[.|?]", "The colours of the rainbow are red, "
     "orange, yellow, green, blue and violet."),
    ("(name|list|tell me|give me) (some|three|a few) (colours|colors).", "Red, blue and green are colours."),
    ("(name|list|tell me|give me) (some|three|a few) animals.", "Cats, dogs and horses are animals."),
    ("(name|list|tell me|give me) (some|three|a few) countries.", "France, Japan and Brazil are countries."),
    ("(list|name|tell me|what are) the continents[.|?]", "The continents are Africa, Antarctica, Asia, Australia, "
     "Europe, North America and South America."),
    ("what is the (largest|biggest) animal[ in the world]?", "The blue whale is the largest animal."),
    ("what is the tallest animal?", "The giraffe is the tallest animal."),
    ("what is the largest (ocean|sea)?", "The Pacific Ocean is the largest ocean."),
    ("what is the (highest|tallest) mountain[ in the world]?", "Mount Everest is the highest mountain."),
    ("how many (legs|feet) does a (person|human|man) have?", "A person has two legs."),
    ("how many fingers does a (hand|person|human) have?", "A hand has five fingers."),
    ("(what|which) planet do we live on?", "We live on the Earth."),
    ("is the earth (round|flat)?", "The Earth is round."),
    ("what (gives us light|shines) (by|during the) day?", "The sun shines during the day."),
    ("what is (water|ice) made of?", "Water is made of hydrogen and oxygen, and ice is frozen water."),
    ("what is ice?", "Ice is frozen water."),
    ("at (what|which) temperature does water (freeze|boil)?", "Water freezes at 0 degrees and boils at 100 degrees "
     "Celsius."),
    ("why is the sky blue?", "The air scatters blue light more than red light, so the sky looks blue."),
    ("(what is|what's) the alphabet?", "The alphabet is the list of letters from A to Z."),
    ("how many letters (are in|does) the alphabet[ have]?", "The English alphabet has 26 letters."),
    ("say the alphabet.", "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z."),
)  # fmt: skip


def capitals(rng: Random, person: Person) -> list[Turn]:
    """The capital of a country, sometimes of a second one; the country of a capital; where a country is."""
    kind = rng.random()
    if kind < 0.12:
        country, (city, _) = rng.choice(list(CAPITALS.items()))
        country = "the United Kingdom" if city == "London" else country
        return [Turn(ask(rng, rng.choice(WHICH), c=city), f"{city.rstrip('.')} is the capital of {country}.")]
    if kind < 0.25:
        country, (_, continent) = rng.choice(list(CAPITALS.items()))
        return [
            Turn(ask(rng, rng.choice(WHERE), c=country), f"{capitalize(country)} is in {continent}.", f"{continent}.")
        ]
    if kind < 0.33:
        word = capitalize(made_up_word(rng, rng.randint(2, 3)))
        return [Turn(ask(rng, rng.choice(CAPITAL), c=word), "I don't know that country.")]
    turns = [_capital(rng, CAPITAL)]
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        turns.append(_capital(rng, AND_OF))
    return turns


def _capital(rng: Random, frames: tuple[str, ...]) -> Turn:
    country = asked = rng.choice(list(CAPITALS))
    if rng.random() < 0.12:
        asked = rng.choice(list(NICKNAMES))
        country = NICKNAMES[asked]
    city = CAPITALS[country][0].rstrip(".")
    spoken = asked.removeprefix("the ") if rng.random() < 0.2 else asked
    if " " not in spoken and rng.random() < 0.5:  # typos in the name, too
        text = ask(rng, rng.choice(frames).replace("{c}", spoken))
    else:
        text = ask(rng, rng.choice(frames), c=spoken)
    return Turn(text, f"The capital of {country} is {city}.", f"{city}.")


def animals(rng: Random, person: Person) -> list[Turn]:
    """One fact about an animal."""
    n = rng.choice(list(ANIMALS))
    a, p = article(n), PLURALS.get(n, n + "s")
    if rng.random() < 0.12:
        return [Turn(ask(rng, rng.choice(FACT)), ANIMALS[n][5])]
    if rng.random() < 0.12:
        return [_can(rng, n)]
    sound = ANIMALS[n][0]
    if sound and rng.random() < 0.08:
        n = next(name for name in ANIMALS if ANIMALS[name][0] == sound)  # the best known one with this sound
        return [
            Turn(
                ask(rng, rng.choice(WHO_SAYS), s=sound), f"{capitalize(article(n))} says {sound}.", capitalize(f"{n}.")
            )
        ]
    frames, answer, short = rng.choice(_animal_facts(n, a))
    return [Turn(ask(rng, rng.choice(frames), a=a, n=n, p=p), capitalize(answer), short)]


def _animal_facts(n: str, a: str) -> list[tuple[tuple[str, ...], str, str]]:
    sound, legs, young, home, food, fact = ANIMALS[n]
    count = number_words(legs) if legs else "no"
    facts = [
        (LEGS, f"{a} has {count} legs.", f"{capitalize(count)}."),
        (YOUNG, f"a young {n} is called {article(young)}.", f"{capitalize(young)}."),
        (LIVES, f"{a} lives {home}.", ""),
        (EATS, f"{a} eats {food}.", ""),
        (ABOUT, fact, ""),
        (ABOUT, fact, ""),
    ]
    return [*facts, (SAYS, f"{a} says {sound}.", f"{capitalize(sound)}.")] if sound else facts


def _can(rng: Random, n: str) -> Turn:
    """Whether an animal can fly or swim."""
    verb = "swim" if n in SWIM and rng.random() < 0.5 else "fly"
    able = verb == "swim" or n in FLY
    answer = f"Yes, {article(n)} can {verb}." if able else f"No, {article(n)} can't {verb}."
    text = ask(rng, "can ({a}|{p}) {v}?", a=article(n), p=PLURALS.get(n, n + "s"), v=verb)
    return Turn(text, answer, "Yes." if able else "No.")


def colours(rng: Random, person: Person) -> list[Turn]:
    """The colour of a thing or a mixture."""
    if rng.random() < 0.25:
        (a, b), c = rng.choice(list(MIXTURES.items()))
        first, second = rng.sample((a, b), 2)
        text = ask(rng, rng.choice(MIX), a=first, b=second)
        return [Turn(text, f"{capitalize(first)} and {second} make {c}.", f"{capitalize(c)}.")]
    thing, colour = rng.choice(list(COLOURS.items()))
    answer = Turn(ask(rng, rng.choice(COLOUR), t=thing), f"{capitalize(thing)} is {colour}.", f"{capitalize(colour)}.")
    return [answer]


def foods(rng: Random, person: Person) -> list[Turn]:
    """What kind of food something is."""
    kind = rng.choice(("fruit", "fruit", "vegetable", "drink", "sweet"))
    if rng.random() < 0.2:
        some = listed([f"{f}s" if kind in ("fruit", "vegetable") else f for f in FOODS[kind][:3]])
        some = some.replace("cherrys", "cherries").replace("potatos", "potatoes")
        plural = f"{kind}s" if kind != "fruit" else "fruits"
        return [Turn(ask(rng, rng.choice(NAME_FOODS[:2]), k=kind), f"{capitalize(some)} are {plural}.")]
    real = rng.choice(("fruit", "vegetable", "drink", "sweet"))
    food = rng.choice(FOODS[real])
    noun = food if real == "drink" or food in ("candy", "chocolate") else article(food)
    yes = real == kind
    answer = f"{'Yes' if yes else 'No'}, {noun} is a {real}."
    return [Turn(ask(rng, rng.choice(FOOD), f=noun, k=kind), answer, "Yes." if yes else "No.")]


def _next(rng: Random, names: list[str], after: tuple[str, ...], before: tuple[str, ...]) -> Turn:
    i = rng.randrange(len(names))
    slot = "d" if names is DAYS else "m"
    if rng.random() < 0.6:
        found = names[(i + 1) % len(names)]
        return Turn(
            ask(rng, rng.choice(after), keep=False, **{slot: names[i]}), f"{found} comes after {names[i]}.", f"{found}."
        )
    found = names[i - 1]
    return Turn(
        ask(rng, rng.choice(before), keep=False, **{slot: names[i]}), f"{found} comes before {names[i]}.", f"{found}."
    )


def _month(rng: Random) -> Turn:
    i = rng.randrange(12)
    if rng.random() < 0.5:
        days = f"{MONTH_DAYS[i]} days" + (", and 29 in a leap year" if i == 1 else "")
        return Turn(ask(rng, rng.choice(MONTH_LENGTH), m=MONTHS[i]), f"{MONTHS[i]} has {days}.", f"{MONTH_DAYS[i]}.")
    text = ask(rng, rng.choice(MONTH_NUMBER), o=ORDINALS[i])
    return Turn(text, f"{MONTHS[i]} is the {ORDINALS[i]} month.", f"{MONTHS[i]}.")


def _season(rng: Random) -> Turn:
    season, following = rng.choice(list(SEASONS.items()))
    text = ask(rng, rng.choice(SEASON_AFTER), s=season)
    return Turn(text, f"{capitalize(following)} comes after {season}.", f"{capitalize(following)}.")


CALENDAR: tuple[Callable[[Random], Turn], ...] = (
    lambda rng: _next(rng, DAYS, DAY_AFTER, DAY_BEFORE),
    lambda rng: _next(rng, MONTHS, MONTH_AFTER, MONTH_BEFORE),
    _month,
    _season,
)


def calendar(rng: Random, person: Person) -> list[Turn]:
    """Days, months and seasons."""
    return [rng.choice(CALENDAR)(rng)]


def lists(rng: Random, person: Person) -> list[Turn]:
    """Questions with one answer each."""
    question, answer = rng.choice(LISTS)
    return [Turn(ask(rng, question), answer)]
