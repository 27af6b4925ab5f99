"""Short stories, assembled from sentences, about a requested subject."""

from random import Random

from demo_model.dialogue import Person, Turn
from demo_model.people import NAMES, PET_NAMES
from demo_model.text import article, ask, capitalize, expand
from demo_model.world import ANIMALS

HEROES = (
    *ANIMALS,
    *"girl boy king queen robot teacher farmer wizard doctor sailor princess prince model computer".split(),
)
STORY = (
    "(tell me|tell|write|write me|i want|i want to hear|make up) a [short |little |nice |good ]story[, please|.|?]",
    "(can|could) you (tell|write) [me ]a [short ]story?",
    "(story|a story, please|story time)[.]",
    "do you know a [good |nice ]story?",
)
STORY_ABOUT = (
    "(tell me|tell|write|write me|i want) a [short |little |nice ]story (about|with) {h}[, please|.]",
    "(can|could) you (tell|write) [me ]a [short ]story about {h}?",
    "a story about {h}[, please|.]",
    "do you know a story about {h}?",
)
ANOTHER = ("(another|another one|one more|another story|one more story|again|tell me another one)[, please|.|!]",)
PLACES = (
    "in a small house by a river",
    "near a dark forest",
    "in an old castle",
    "on a farm",
    "in a big city",
    "by the sea",
)
FINDS = ("a golden key", "a small red box", "an old map", "a letter", "a blue stone", "a lost kitten", "a silver coin")
HELPERS = ("an old owl", "a friendly fox", "a small mouse", "a kind woman", "a clever bird", "a quiet turtle")
ENDS = (
    "In the end they became good friends.",
    "In the evening {name} went home and was happy.",
    "Everybody was glad, and they had a big cake.",
    "Since then {name} has never been alone.",
)
BODY = (
    "One day {name} found {find}. {name} asked {helper} what to do. They looked for the owner together and found "
    "{owner}.",
    "One day {name} got lost in the rain. There {name} met {helper}, who knew the way. Together they walked home.",
    "One morning {name} wanted to see the world. On the way {name} met {helper} and shared some bread. They travelled "
    "on together.",
    "One night {name} heard a noise. It was {helper}, who was afraid of the dark. {name} lit a lamp, and they talked "
    "until morning.",
)
OWNERS = ("a small girl", "an old man", "a young prince", "a tired sailor")


def story(rng: Random, hero: str) -> str:
    """About seven sentences with one hero."""
    name = rng.choice(PET_NAMES if hero in ANIMALS else NAMES)
    start = f"Once upon a time there was {article(hero)} called {name}. {name} lived {rng.choice(PLACES)}."
    text = f"{start} {rng.choice(BODY)} {rng.choice(ENDS)}"
    slots = {"find": rng.choice(FINDS), "helper": rng.choice(HELPERS), "owner": rng.choice(OWNERS)}
    for slot, value in {**slots, "name": name}.items():
        text = text.replace("{" + slot + "}", value)
    return text


def stories(rng: Random, person: Person) -> list[Turn]:
    """A story, sometimes two."""
    hero = rng.choice(HEROES)
    frames = STORY_ABOUT if rng.random() < 0.65 else STORY
    turns = [Turn(ask(rng, rng.choice(frames), h=article(hero)), story(rng, hero))]
    if rng.random() < 0.15:
        turns.append(Turn(ask(rng, rng.choice(ANOTHER)), story(rng, rng.choice(HEROES))))
    return turns


def beginning(rng: Random) -> str:
    """A story without a question."""
    return capitalize(expand(rng, story(rng, rng.choice(HEROES))))
