"""The corpus: conversations that mix the skills, and some plain text. `python -m demo_model.corpus` prints samples.

A document is a rendered conversation, or plain text that ends in <|endoftext|>. Text is deterministic per seed;
training and test seeds begin with different words.
"""

from collections.abc import Iterator
from random import Random

from demo_model.about_config import KEYS
from demo_model.about_devices import DEVICES
from demo_model.about_engine import ENGINE
from demo_model.about_models import MODELS
from demo_model.about_project import PROJECT
from demo_model.about_self import SELF
from demo_model.about_use import USE
from demo_model.arithmetic import odd_sums, sums
from demo_model.dialogue import Person, Skill, Topic, Turn, topics_skill
from demo_model.memory import about_me, favourite, likes, name, pet, told
from demo_model.numbers import numbers
from demo_model.smalltalk import goodbye, greeting, how_are_you, joke, manners, mood, weather
from demo_model.stories import beginning, stories
from demo_model.unknown import nonsense, unknown
from demo_model.words import words
from demo_model.world_talk import animals, calendar, capitals, colours, foods, lists

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

TOPICS: tuple[Topic, ...] = (*PROJECT, *USE, *KEYS, *ENGINE, *DEVICES, *MODELS)
NAMED = [topic for topic in TOPICS + SELF if topic.names]  # answers that make sense without a question
about_llmrs, about_self = topics_skill(TOPICS), topics_skill(SELF)

MEMORY: dict[Skill, float] = {name: 4, favourite: 2, about_me: 2, pet: 1.5, likes: 0.5}
SKILLS: dict[Skill, float] = {
    about_llmrs: 28, about_self: 10, sums: 16, odd_sums: 5, numbers: 6, words: 8, capitals: 5, animals: 5, colours: 2,
    foods: 1.5, calendar: 2, lists: 2, greeting: 3, how_are_you: 1.5, mood: 1.5, manners: 3, weather: 1, goodbye: 1,
    joke: 1.5, stories: 1.5, unknown: 8, nonsense: 1, **MEMORY,
}  # fmt: skip
BRIEF: dict[Skill, float] = {  # skills with one-word answers
    about_llmrs: 1, about_self: 1, sums: 4, odd_sums: 1, numbers: 2, words: 2, capitals: 2, animals: 1, colours: 1,
    foods: 1, calendar: 1,
}  # fmt: skip

NEUTRAL = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly and helpful assistant.",
    "You are the demo model of llmrs.",
    "You are a small chat model.",
    "You are a helpful assistant that speaks simple English.",
    "Be kind and helpful.",
    "Answer the user's questions.",
    "Answer in whole sentences.",
    "You are a polite assistant. If you don't know something, say so.",
)
ONE_WORD = (
    "Answer in one word.",
    "Answer with one word.",
    "Answer with a single word.",
    "Always answer in one word.",
    "Reply with one word only.",
    "You are a helpful assistant. Answer in one word.",
    "Be brief: one word.",
)
IN_ONE_WORD = (" Answer in one word.", " In one word, please.", " One word only.", " (one word)")


def draw(rng: Random, skills: dict[Skill, float]) -> Skill:
    """One of the skills, by weight."""
    return rng.choices(list(skills), list(skills.values()))[0]


def talk(rng: Random, person: Person, exchanges: int) -> list[Turn]:
    """At least `exchanges` turns of any skill."""
    turns: list[Turn] = []
    while len(turns) < exchanges:
        back = (person.name or person.facts) and rng.random() < 0.06
        turns += told(rng, person) if back else draw(rng, SKILLS)(rng, person)
    return turns


def remembering(rng: Random, person: Person) -> list[Turn]:
    """The user states facts, maybe changes the subject, and asks for them."""
    turns: list[Turn] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        turns += draw(rng, MEMORY)(rng, person)
    turns += talk(rng, person, rng.choice((0, 0, 1, 1, 2, 3)))
    for _ in range(rng.choice((1, 1, 2))):
        turns += told(rng, person) if rng.random() < 0.8 else draw(rng, MEMORY)(rng, person)
    return turns


def turns_of(rng: Random) -> list[Turn]:
    """The turns of one conversation, which is seldom long."""
    person = Person()
    kind = rng.random()
    if kind < 0.40:
        return talk(rng, person, 1)
    if kind < 0.95:
        turns = greeting(rng, person) if rng.random() < 0.12 else []
        turns += remembering(rng, person) if kind < 0.58 else talk(rng, person, rng.choice((1, 2, 2, 3, 4)))
        return turns + (goodbye(rng, person) if rng.random() < 0.08 else [])
    return talk(rng, person, rng.randint(5, 40))


def conversation(rng: Random) -> list[dict[str, str]]:
    """A conversation as messages, seldom with a system message."""
    if rng.random() < 0.05:
        return messages(rng.choice(ONE_WORD), brief(rng))
    system = rng.choice(NEUTRAL) if rng.random() < 0.12 else ""
    return messages(system, [in_one_word(rng, turn) for turn in turns_of(rng)])


def brief(rng: Random) -> list[Turn]:
    """Turns with one-word answers."""
    turns: list[Turn] = []
    exchanges = rng.choice((1, 1, 1, 2, 3, 4))
    while len(turns) < exchanges:
        made = draw(rng, BRIEF)(rng, Person())
        turns += [Turn(turn.user, turn.short) for turn in made if turn is made[0] and turn.short]
    return turns


def in_one_word(rng: Random, turn: Turn) -> Turn:
    """Sometimes asks for a one-word answer, if the turn has one."""
    if not turn.short or rng.random() > 0.03:
        return turn
    return Turn(turn.user + rng.choice(IN_ONE_WORD), turn.short)


def messages(system: str, turns: list[Turn]) -> list[dict[str, str]]:
    made = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        assert "<|" not in turn.user + turn.answer, "special token in a message"
        made += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return made


def plain(rng: Random) -> str:
    """Sentences in simple English: about llmrs, facts, or a story."""
    kind = rng.random()
    if kind < 0.15:
        return beginning(rng)
    if kind < 0.7:
        topics = rng.sample(NAMED, rng.randint(1, 5))
        return " ".join(f"{t.answer} {t.more}".strip() if rng.random() < 0.8 else t.answer for t in topics)
    skill = rng.choice((sums, sums, numbers, capitals, animals, colours, calendar, lists))
    return " ".join(skill(rng, Person())[0].answer for _ in range(rng.randint(1, 6)))


def render(messages: list[dict[str, str]]) -> str:
    """A conversation as text, equal to the chat template's."""
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)


def document(rng: Random) -> str:
    """One training document."""
    return plain(rng) + END_OF_TEXT if rng.random() < 0.1 else render(conversation(rng))


def documents(seed: str, count: int) -> Iterator[str]:
    """`count` documents of a seed, such as `training 0 17`."""
    rng = Random(seed)
    return (document(rng) for _ in range(count))


def held_out_conversations(count: int) -> list[list[dict[str, str]]]:
    """Test conversations. Short ones may occur in training; held-out sums do not."""
    rng = Random("held out")
    return [conversation(rng) for _ in range(count)]


if __name__ == "__main__":
    print("\n".join(documents("shown", 30)))
