"""Parts of conversations: turns, facts about the user, and topics with their questions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TypeAlias

from demo_model.text import ask, expand


@dataclass(frozen=True)
class Turn:
    """A user message and its answer; `short` is the one-word answer, if any."""

    user: str
    answer: str
    short: str = ""


@dataclass
class Person:
    """Facts that the user stated in this conversation."""

    name: str = ""
    facts: dict[str, str] = field(default_factory=dict)  # "favourite colour" -> "blue"


Skill: TypeAlias = Callable[[Random, Person], list[Turn]]


@dataclass(frozen=True)
class Topic:
    """A subject of questions. `names` fit into "what is ...?", `asks` are whole questions."""

    names: tuple[str, ...]
    answer: str
    more: str = ""
    asks: tuple[str, ...] = ()
    short: str = ""


DEFINE = (
    "(what is|what's|what are) {n}?",
    "(what is|what's) {n}?",
    "what is {n}[ exactly| really| again| in simple words]?",
    "what is {n}[ in llmrs|, please| about]?",
    "what does {n} mean?",
    "what do you mean by {n}?",
    "what is (meant by|the meaning of) {n}?",
    "(explain|describe|define) {n}[ to me| briefly| simply| in simple words].",
    "[please ](explain|describe) (what {n} is|{n})[ please].",
    "(tell me|say something|talk) about {n}[, please].",
    "tell me (what {n} is|something about {n}).",
    "(can|could|would) you (explain|describe|tell me about) {n}[ to me]?",
    "(can|could) you tell me what {n} (is|means)?",
    "do you know (what {n} is|{n}|about {n})?",
    "(i want|i would like|i'd like) to know (what {n} is|about {n}|more about {n}).",
    "(i don't know|i do not understand|i don't understand) (what {n} is|{n}).",
    "what (do you know|can you tell me|can you say) about {n}?",
    "how does {n} work?",
    "what does {n} do?",
    "what is {n} (for|good for|used for)?",
    "(give me|i need) a [short ](definition|explanation) of {n}.",
    "have you heard of {n}?",
    "{n}?",
    "{n}",
    "{n}, what is that?",
    "[i keep reading about|i have read about|people talk about] {n}. what is (that|it)?",
    "(help me understand|teach me about|introduce|summarize) {n}.",
)
IN_DETAIL = (
    "tell me more about {n}.",
    "explain {n} in (detail|more detail).",
    "tell me (everything|all) about {n}.",
    "what is {n}? (explain|answer) in detail.",
    "(describe|explain) {n} in (a few|two or three|several) sentences.",
    "give me a (long|detailed) explanation of {n}.",
)
MORE = (
    "(tell me more|more|go on|continue|and|what else|anything else)[.|?]",
    "(can you|could you|please) (tell me more|explain more|say more|go on)[?|.]",
    "(tell|give) me more[ details| about that| about it].",
    "(is there|do you know) (more|anything else)[ about it]?",
    "(interesting|i see|ok|okay|cool|nice)[,|.|!] (tell me more|go on|and what else?|more please)",
)
NO_MORE = "That is all that I know about it."


def topic_turns(rng: Random, topic: Topic) -> list[Turn]:
    """A question about a topic, and sometimes a second one for more."""
    if topic.more and topic.names and rng.random() < 0.1:
        return [Turn(_question(rng, rng.choice(IN_DETAIL), topic), f"{topic.answer} {topic.more}")]
    asks = topic.asks and (not topic.names or rng.random() < 0.6)
    template = rng.choice(topic.asks) if asks else rng.choice(DEFINE)
    turns = [Turn(_question(rng, template, topic), topic.answer, topic.short)]
    if rng.random() < (0.2 if topic.more else 0.03):
        turns.append(Turn(ask(rng, rng.choice(MORE)), topic.more or NO_MORE))
    return turns


def _question(rng: Random, template: str, topic: Topic) -> str:
    # no slot: a topic's name may be mistyped
    name = expand(rng, rng.choice(topic.names)) if topic.names else ""
    return ask(rng, template.replace("{n}", name))


def topics_skill(topics: tuple[Topic, ...]) -> Skill:
    """A skill that asks about one of the topics."""
    return lambda rng, person: topic_turns(rng, rng.choice(topics))
