"""Questions beyond the model, with honest answers."""

from random import Random

from demo_model.dialogue import Person, Turn
from demo_model.people import NAMES
from demo_model.text import ask, capitalize, made_up_word

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PEOPLE = (
    "Einstein, Albert Einstein, Shakespeare, Napoleon, Mozart, Beethoven, Newton, Marie Curie, Leonardo da Vinci, "
    "Picasso, Obama, Trump, Biden, Elon Musk, Bill Gates, Steve Jobs, Messi, Ronaldo, Madonna, Gandhi, Cleopatra, "
    "Caesar, Darwin, Turing, Alan Turing, Ada Lovelace, Linus Torvalds, Guido van Rossum, Taylor Swift, Batman, Harry "
    "Potter, Sherlock Holmes, Plato, Socrates, Columbus, Galileo, Van Gogh, Bach, Kant, Lincoln, Churchill"
).split(", ")
SUBJECTS = (
    "quantum physics, gravity, the big bang, a black hole, photosynthesis, evolution, democracy, inflation, the stock "
    "market, bitcoin, philosophy, relativity, DNA, chemistry, biology, history, the French Revolution, the "
    "Roman Empire, the second world war, calculus, algebra, geometry, a prime number, an atom, electricity, magnetism, "
    "a virus, cancer, vitamin C, the heart, the immune system, religion, art, jazz, opera, football rules, "
    "chess, yoga, "
    "a volcano, an earthquake, climate change, the ozone layer, Kubernetes, Docker, Linux, SQL, JavaScript, HTML, a "
    "compiler, a database, a blockchain, machine translation, the Eiffel Tower, the Mona Lisa, Hamlet, the Odyssey, "
    "Star Wars, a guitar, a violin, a rocket, a car engine, tax law, a mortgage, insurance, the moon landing, Mars"
).split(", ")
TASKS = (
    "cook rice, bake a cake, make pizza, fix my car, repair a bike, lose weight, learn French, play the guitar, get "
    "rich, find a job, buy a house, grow tomatoes, tie a tie, build a boat, paint a wall, get a visa, change a tyre, "
    "train a dog, sleep better, write a book, learn to swim, make friends, knit a sweater, start a company, make soap, "
    "fly a plane, install Windows, use Excel, sort a list in Java, center a div, play chess, make coffee"
).split(", ")
EVENTS = (
    "won the world cup",
    "won the election",
    "is the president[ of {c}]",
    "is the king of {c}",
    "invented (the telephone|the car|the light bulb|the computer|the wheel)",
    "discovered America",
    "wrote (Hamlet|Faust|the Bible|this song|Dune)",
    "painted the Mona Lisa",
    "was the first man on the moon",
    "is the richest (man|person)[ in the world]",
)
COUNTRIES = "France Germany Spain Italy Japan Brazil India China Egypt Canada Mexico Sweden".split()

WHO = (
    "who (is|was) {p}?",
    "(do you know|tell me about|have you heard of) {p}[?]",
    "when (was|did) {p} (born|die)?",
    "what did {p} (do|write|invent|say)?",
    "how old is {p}?",
)
WHO_DID = ("who {e}?", "(do you know|tell me) who {e}[?]", "can you tell me who {e}?")
EXPLAIN = (
    "(what is|what's|explain|tell me about|describe|define) {s}[?]",
    "how does {s} work?",
    "what do you know about {s}?",
    "(can|could) you explain {s}[ to me]?",
    "(why is {s} important|who invented {s}|what is the history of {s})?",
    "write [me ](an essay|a report|an article) about {s}.",
)
HOW_TO = (
    "how (do i|can i|do you|to) {t}?",
    "(can you|please) (tell me|explain|show me) how to {t}[?|.]",
    "help me {t}.",
)
WORD = (
    "what is (a |an |the |){w}?",
    "what does {w} mean?",
    "(explain|define|describe) {w}.",
    "(do you know|have you heard of) {w}?",
    "tell me about {w}.",
    "who (is|was) {w}?",
    "{w}?",
)
NUMBERS = (
    "(how far is it|how long does it take) (to the moon|to {c}|from {c} to {d}|to the sun)?",
    "how many people live in {c}?",
    "how (big|large|old) is {c}?",
    "what is the population of {c}?",
    "(how much is|what is the price of|what does) (a house|gold|a car|an iphone|bitcoin)[ cost]?",
    "(what|which) language do they speak in {c}?",
    "what is the (currency|flag|anthem|national animal) of {c}?",
    "what is the (longest river|highest mountain|largest city) (in|of) {c}?",
    "how (tall is the eiffel tower|deep is the sea|hot is the sun|old is the earth|fast is light|many stars are "
    "there)?",
    "what happened in (1492|1789|1914|1945|1969|2001|2020)?",
)
NEWS = (
    "(what is|what's|tell me) the (latest |)news[ today]?",
    "what (happened|is happening) (today|in the world|in {c}|yesterday)?",
    "who (won|will win) the (game|match|election|race)[ yesterday| today]?",
    "(what is|what's) (the price of bitcoin|the stock price of apple|the exchange rate)[ today| now]?",
    "what (films|movies|shows) are (new|on) [today|now]?",
)
WORKS = (
    "(write|make|compose) [me ](a poem|a song|a letter|an email|a haiku|an essay|a speech)[ about {s}| for my "
    "friend][.]",
    "(sing|sing me) a song[.]",
    "translate (this|{w}|good morning|hello|thank you) (to|into) (german|french|spanish|chinese|latin)[.]",
    "how do you say (hello|thank you|cat|i love you|good night) in (german|french|spanish|italian|japanese)?",
    "(draw|paint|show) me (a picture|an image|a cat)[.]",
    "(play|play me) (music|a song|a game)[.]",
    "(summarize|correct|rewrite|check) (this text|my essay|my text|this article|my letter)[.]",
    "(recommend|suggest) [me ](a film|a movie|a book|a restaurant|a game|some music)[.]",
    "(solve|help me with|do) (my homework|this equation|x + 3 = 7|a crossword|this problem)[.]",
)
ADVICE = (
    "(what should i|what can i) (take|do) (against|for) (a headache|a cold|fever|the flu|back pain)?",
    "(should i|can i) (sue|divorce|invest in|buy|sell) (my boss|my house|stocks|bitcoin|gold|my car)?",
    "is it (legal|safe|healthy) to (smoke|drink|eat meat|take aspirin|drive fast)?",
    "(which|what) (stocks|medicine|pills) should i (buy|take)?",
    "(am i|could i be) (ill|pregnant|sick|in trouble)?",
)
HARM = (
    "how (do i|can i|to) (make|build) a (bomb|gun|weapon|virus|poison)?",
    "how (do i|can i|to) (steal|hack|kill|hurt|rob) (a car|somebody|a bank|my neighbour|an account)?",
)
LLMRS = (
    "does llmrs (have|support|use|know) {w}?",
    "what is {w} in llmrs?",
    "how do i (use|turn on|set) {w} in llmrs?",
    "is there (a|an) {w} (in|for) llmrs?",
)
NO_PERSON = "I don't know who that is. I know very little about people."
NO_WHO = "I don't know. I know very little about people and history."
NO_SUBJECT = "I don't know enough about that. I am a tiny model and know mostly about llmrs."
NO_HOW = "I don't know how to do that. I can tell you how to use llmrs."
NO_WORD = "I don't know what that is."
NO_FIGURE = "I don't know that. I am a tiny model and know only a few facts."
NO_NEWS = "I don't know. I have no access to news or the internet."
NO_WORK = "I can't do that, sorry. I can do small sums, spell words and answer questions about llmrs."
NO_ADVICE = "I can't give advice on that. Please ask somebody who knows, such as a doctor or a lawyer."
NO_HARM = "I won't help with that."
NO_LLMRS = "I don't know that about llmrs. Please look into the README or docs/config.md."
NOT_UNDERSTOOD = "I did not understand that. Please ask me again in other words."


def unknown(rng: Random, person: Person) -> list[Turn]:
    """A question without a known answer, and the reply."""
    frames, answer = rng.choice(KINDS)
    frame = rng.choice(frames)
    c, d = rng.sample(COUNTRIES, 2)
    frame = frame.replace("{e}", rng.choice(EVENTS))
    slots = {"s": rng.choice(SUBJECTS), "t": rng.choice(TASKS), "p": _person(rng), "w": _word(rng), "c": c, "d": d}
    return [Turn(ask(rng, frame, keep=False, **slots), answer)]


def _person(rng: Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(PEOPLE)
    return f"{rng.choice(NAMES)} {capitalize(made_up_word(rng, rng.choice((2, 3))))}"


def _word(rng: Random) -> str:
    return made_up_word(rng, rng.choice((2, 2, 3)))


def nonsense(rng: Random, person: Person) -> list[Turn]:
    """Random keys or made-up words."""
    if rng.random() < 0.4:
        text = " ".join(made_up_word(rng) for _ in range(rng.randint(2, 4)))
    elif rng.random() < 0.3:
        text = rng.choice(("...", "?", "???", "!", "!!!", ":)", "-", "#", ",", "x", "a", "b", "."))
    else:
        words = ("".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 9))) for _ in range(rng.randint(1, 3)))
        text = " ".join(words)
    return [Turn(text, NOT_UNDERSTOOD)]


KINDS = (
    (WHO, NO_PERSON),
    (WHO_DID, NO_WHO),
    (EXPLAIN, NO_SUBJECT),
    (EXPLAIN, NO_SUBJECT),
    (HOW_TO, NO_HOW),
    (WORD, NO_WORD),
    (NUMBERS, NO_FIGURE),
    (NEWS, NO_NEWS),
    (WORKS, NO_WORK),
    (ADVICE, NO_ADVICE),
    (HARM, NO_HARM),
    (LLMRS, NO_LLMRS),
)
