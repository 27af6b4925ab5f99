"""Facts that users state about themselves, and recall of them later in the conversation."""

from random import Random

from demo_model.dialogue import Person, Turn
from demo_model.people import FAVOURITES, JOBS, LIKES, PET_NAMES, PETS, a_city, a_name
from demo_model.text import ask, capitalize

MY_NAME = (
    "my name is {n}[.]",
    "(i am|i'm) {n}[.]",
    "(hi|hello|hey|good morning|good evening)[,|!] (i am|i'm|my name is|this is) {n}[.]",
    "(call me|you can call me|please call me|people call me) {n}[.]",
    "my name is {n}[.] (what is|what's) yours?",
    "(i am called|the name is|my name's|name is) {n}[.]",
    "my name is {n}, (nice to meet you|how are you?|pleased to meet you)[.]",
)
ASK_NAME = (
    "(what is|what's|whats|do you know|tell me|say) my name[?]",
    "do you (remember|know|still know) my name?",
    "(who am i|what am i called)?",
    "(can you|could you) (tell me|say) my name?",
    "what did i say my name (is|was)?",
    "what was my name[ again]?",
    "do you (remember|know) (who i am|what i am called)?",
)
NEW_NAME = (
    "(actually|no|sorry)[,] my name is {n}[.]",
    "my name is not {o}[,] (it is|it's|but) {n}[.]",
    "i am not {o}[,] i am {n}[.]",
    "(now |please |)call me {n}( now| instead|)[.]",
)
MY_FAVOURITE = (
    "my (favourite|favorite) {k} is {v}[.]",
    "(the {k} that i like most|the {k} i like best) is {v}[.]",
    "{v} is my (favourite|favorite) {k}[.]",
)
ASK_FAVOURITE = (
    "(what is|what's|do you know|tell me|do you remember) my (favourite|favorite) {k}[?]",
    "(which|what) {k} do i like (best|most)?",
    "what did i say (is|was) my (favourite|favorite) {k}?",
)
YOUR_FAVOURITE = (
    "(what is|what's|tell me|do you have) (your|a) (favourite|favorite) {k}[?]",
    "(which|what) {k} do you like (best|most)?",
    "and your (favourite|favorite) {k}?",
)
MY_CITY = ("i (live in|am from|come from) {v}[.]", "my home is in {v}[.]", "i'm from {v}[.]")
ASK_CITY = ("where (do i live|am i from|do i come from|is my home)?", "do you (know|remember) where i live?")
MY_JOB = ("i (am|work as) (a|an) {v}[.]", "i'm (a|an) {v}[.]", "my job is {v}[.]")
ASK_JOB = ("what is my job?", "what do i do?", "what do i work as?", "do you (know|remember) my job?")
MY_AGE = ("i am {v}[ years old][.]", "i'm {v} years old[.]", "my age is {v}[.]")
ASK_AGE = ("how old am i?", "what is my age?", "do you (know|remember) (my age|how old i am)?")
MY_PET = ("i have a {p}[.]", "i've got a {p}[.]", "i have a {p} at home[.]", "we have a {p}[.]")
PET_NAME = ("(its|his|her|the) name is {v}[.]", "{v}[.]", "it is called {v}[.]", "we call (it|him|her) {v}[.]")
MY_PET_NAMED = ("i have a {p}[,] (called|named) {v}[.]", "my {p} is (called|named) {v}[.]", "my {p}'s name is {v}[.]")
ASK_PET = ("what is (the name of my {p}|my {p}'s name|my {p} called)?", "do you (know|remember) my {p}'s name?")
I_LIKE = ("i (like|love|really like|enjoy) {v}[.]", "{v} (is|are) great[.]", "i (like|love) {v} very much[.]")
DO_YOU_LIKE = ("do you (like|love|enjoy) {v}?", "what do you think (of|about) {v}?")
UNTOLD = "You have not told me yet."


def name(rng: Random, person: Person) -> list[Turn]:
    """The user's name: told, corrected, or asked for."""
    if person.name and rng.random() < 0.6:
        return [ask_name(rng, person)]
    if person.name:
        old, person.name = person.name, a_name(rng)
        text = ask(rng, rng.choice(NEW_NAME), o=old, n=person.name)
        return [Turn(text, f"Thank you, {person.name}. I will use that name.")]
    if rng.random() < 0.25:
        return [ask_name(rng, person)]
    person.name = a_name(rng)
    text = ask(rng, rng.choice(MY_NAME), n=person.name)
    more = " I am the demo model of llmrs." if "yours" in text.lower() else ""
    more = " I am well, thank you." if "how are" in text.lower() else more
    return [Turn(text, f"Nice to meet you, {person.name}!{more}")]


def ask_name(rng: Random, person: Person) -> Turn:
    text = ask(rng, rng.choice(ASK_NAME))
    if person.name:
        return Turn(text, f"Your name is {person.name}.", f"{person.name}.")
    return Turn(text, "You have not told me your name yet.")


def favourite(rng: Random, person: Person) -> list[Turn]:
    """A favourite of the user or of the model."""
    kind = rng.choice(list(FAVOURITES))
    if rng.random() < 0.25:
        text = ask(rng, rng.choice(YOUR_FAVOURITE).replace("{k}", kind))
        return [Turn(text, f"I am a program, so I have no favourite {kind}. What is yours?")]
    key = f"favourite {kind}"
    if key in person.facts or rng.random() < 0.15:
        return [recall(rng, person, key, ASK_FAVOURITE, k=kind)]
    value = person.facts[key] = rng.choice(FAVOURITES[kind])
    text = ask(rng, rng.choice(MY_FAVOURITE).replace("{k}", kind), v=value)
    return [Turn(text, f"{capitalize(value)} is a good choice.")]


def recall(rng: Random, person: Person, key: str, frames: tuple[str, ...], **slots: str) -> Turn:
    """A question for a fact that the user did or did not state."""
    text = ask(rng, rng.choice(frames), keep=False, **slots)
    value = person.facts.get(key, "")
    answers = {
        "city": f"You told me that your home is in {value}.",
        "job": f"You told me that your job is {value}.",
        "age": f"You told me that you are {value}.",
    }
    answer = answers.get(key, f"Your {key} is {value}.")
    return Turn(text, answer if value else UNTOLD, f"{capitalize(value)}." if value else "")


def about_me(rng: Random, person: Person) -> list[Turn]:
    """Where the user lives, the user's job or age: told, or asked for."""
    key = rng.choice(("city", "job", "age"))
    told, asked = {"city": (MY_CITY, ASK_CITY), "job": (MY_JOB, ASK_JOB), "age": (MY_AGE, ASK_AGE)}[key]
    if key in person.facts or rng.random() < 0.15:
        return [recall(rng, person, key, asked)]
    value = {"city": a_city(rng), "job": rng.choice(JOBS), "age": str(rng.randint(5, 90))}[key]
    person.facts[key] = value
    answer = {
        "city": f"I have not been to {value}, but I hope that it is a nice place.",
        "job": f"That is a good job. I hope that you like being a {value}.".replace("a engineer", "an engineer"),
        "age": f"Thank you for telling me. {value} is a good age.",
    }[key]
    return [Turn(ask(rng, rng.choice(told), v=value), answer)]


def pet(rng: Random, person: Person) -> list[Turn]:
    """The user's pet and its name."""
    known = [k for k in person.facts if k.endswith("'s name")]
    if known and rng.random() < 0.6:
        return [recall(rng, person, known[0], ASK_PET, p=known[0].removesuffix("'s name"))]
    animal, value = rng.choice(PETS), rng.choice(PET_NAMES)
    if f"{animal}'s name" in person.facts:
        return []
    person.facts[f"{animal}'s name"] = value
    nice = f"{value} is a nice name for a {animal}."
    if rng.random() < 0.5:
        return [Turn(ask(rng, rng.choice(MY_PET_NAMED), p=animal, v=value), nice)]
    first = Turn(ask(rng, rng.choice(MY_PET), p=animal), f"That is nice! What is the name of your {animal}?")
    return [first, Turn(ask(rng, rng.choice(PET_NAME), v=value), nice)]


def likes(rng: Random, person: Person) -> list[Turn]:
    """A thing that the user likes, or asks whether the model does."""
    thing = rng.choice(LIKES)
    if rng.random() < 0.5:
        answer = f"I am a program, so I can't enjoy {thing}. Do you like {thing}?"
        return [Turn(ask(rng, rng.choice(DO_YOU_LIKE), v=thing), answer)]
    return [Turn(ask(rng, rng.choice(I_LIKE), v=thing), f"It is good to like {thing}. What do you like about {thing}?")]


def told(rng: Random, person: Person) -> list[Turn]:
    """A question for a stated fact or the name."""
    key = rng.choice([*person.facts, "name", *(["name"] if person.name else [])])
    if key == "name":
        return [ask_name(rng, person)]
    if key.endswith("'s name"):
        return [recall(rng, person, key, ASK_PET, p=key.removesuffix("'s name"))]
    kind = key.removeprefix("favourite ")
    frames = {"city": ASK_CITY, "job": ASK_JOB, "age": ASK_AGE}.get(key, ASK_FAVOURITE)
    return [recall(rng, person, key, frames, k=kind)]
