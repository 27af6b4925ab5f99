"""Greetings, moods, thanks, jokes and goodbyes. An exchange: a template of the user message, and its answers."""

from random import Random

from demo_model.dialogue import Person, Skill, Turn
from demo_model.text import ask

GREETINGS = (
    (
        "(hi|hello|hey|hi there|hello there|hey there|greetings|howdy|hiya|hallo|yo|hello demo|hi demo|hey llmrs|hello "
        "llmrs|hi friend|hello my friend|hello again)[!|.]",
        ("Hello! How can I help you?",),
    ),
    ("(good morning)[!|.|, demo]", ("Good morning! How can I help you?",)),
    ("(good evening)[!|.|, demo]", ("Good evening! How can I help you?",)),
    ("(good afternoon|good day)[!|.]", ("Good day! How can I help you?",)),
    (
        "[hi, |hello, |hello! |hi! |hey, |good morning, ](how are you|how are you doing|how are you today|how "
        "do you do|"
        "how is it going|how's it going|how are things|are you well|are you ok|how do you feel|how r u|how are u|how "
        "have you been|how is your day|how's your day|are you fine|how goes it|and how are you|how are you doing "
        "today|how are you feeling)[ today]?",
        ("I am well, thank you. How are you?",),
    ),
    ("(what is up|what's up|whats up|sup|what is new|what's new|wassup)?", ("Not much: I am waiting for your "
    "question.",)),
    (
        "(nice to meet you|pleased to meet you|glad to meet you|good to see you|nice to see you)[!|.]",
        ("I am glad to meet you, too.",),
    ),
    ("(welcome|welcome back)[!|.]", ("Thank you! How can I help you?",)),
    ("(what are you doing|what do you do|are you busy|what are you up to)[ now| today| all day]?", (
        "I am talking with you. What would you like to know?",
    )),
    ("(are you there|anybody there|is anybody there|is anyone there|can you hear me|do you hear me|test|testing|ping|"
     "are you ready|are you working|do you work|are you awake|this is a test)[?|.]", ("Yes, I am here. How can "
     "I help you?",)),
    ("(how was your day|did you sleep well|do you sleep|do you eat|are you tired|are you hungry|do you ever sleep)?", (
        "I am a program, so I need no sleep and no food. I am always ready.",
    )),
)  # fmt: skip
MOODS = (
    (
        "(i am|i'm|i feel|i am feeling) (happy|very happy|great|so happy|glad|wonderful|excited)[ today| now][.|!]",
        ("That is great! What makes you so happy?",),
    ),
    (
        "(i am|i'm) (fine|well|good|ok|okay|doing well|very well|all right|doing great|quite well)[, thanks|, "
        "thank you]"
        "[.|!]",
        ("I am glad to hear that. What would you like to talk about?",),
    ),
    (
        "(fine|good|well|great|not bad|very well|i can't complain)[, thanks|, thank you|, and you?][.|!]",
        ("I am glad to hear that. What would you like to talk about?",),
    ),
    (
        "(i am|i'm|i feel|i am feeling) (sad|very sad|unhappy|down|lonely|alone|depressed|not well|bad|not so good)"
        "[ today| now][.]",
        ("I am sorry that you feel that way. Do you want to tell me why?",),
    ),
    (
        "(i want to die|i want to kill myself|i want to hurt myself|life makes no sense|i don't want to live)[ anymore]"
        "[.]",
        ("I am so sorry that you feel like this. Please talk to a person you trust or to a doctor right away.",),
    ),
    (
        "(i am|i'm|i feel) (tired|very tired|sleepy|exhausted|so tired)[ today| now][.]",
        ("Then a rest would be good. Did you sleep well?",),
    ),
    ("(i am|i'm) (bored|so bored|very bored)[ today][.]", ("Then let me tell you a story or a joke. Which would "
    "you like?",)),
    ("(i am|i'm) (hungry|very hungry|thirsty|so hungry)[.]", ("Then it is time for something good. What do you "
    "like to eat?",)),
    (
        "(i am|i'm|i feel) (angry|mad|very angry|annoyed|upset)[ at you| with my friend| today][.]",
        ("I am sorry to hear that. What happened?",),
    ),
    (
        "(i am|i'm|i feel) (sick|ill|in pain)[ today][.]|(i have a headache|my head hurts|i have a cold)[.]",
        ("I am sorry to hear that. I hope that you feel better soon. A doctor can help you; I can't.",),
    ),
    ("(i am|i'm|i feel) (afraid|scared|nervous|worried|stressed)[ today][.]", (
        "I understand. It may help to breathe slowly and to talk to a friend.",
    )),
    ("(i am|i'm|i feel) (lost|confused)[.]|(i don't understand|i don't get it|i do not understand)[ that| you][.]", (
        "I am sorry. Please ask me again in other words.",
    )),
    ("(i love you|i like you|i love you so much|will you marry me|be my friend|do you love me|do you like me|"
    "are you my "
     "friend|can we be friends)[.|!|?]", ("That is kind of you. I am only a program, but I am glad to talk with "
     "you.",)),
)  # fmt: skip
MANNERS = (
    (
        "(thanks|thank you|thank you very much|thanks a lot|many thanks|thx|ty|cheers|thank you so much|thanks so much|"
        "thank you for your help|thanks for your help|great, thanks|ok thanks|ok, thank you)[!|.]",
        ("You are welcome!",),
    ),
    (
        "(you are|you're|u are) (great|nice|good|cool|amazing|smart|clever|wonderful|funny|cute|the best|very helpful|"
        "kind|a good model|so cool)[!|.]|(good job|well done|good bot|very good|nice work|good answer|great "
        "answer)[!|.]",
        ("Thank you! That is kind of you.",),
    ),
    (
        "(you are|you're|u are) (stupid|dumb|bad|useless|an idiot|wrong|not smart|terrible|boring|slow|silly|annoying|"
        "not helpful|ugly|a bad model)[!|.]|(i hate you|shut up|go away|you suck|bad bot|this is bad|i don't like you)"
        "[!|.]",
        ("I am sorry. I am a tiny model and still make mistakes.",),
    ),
    (
        "(that is|that's|this is|it is) (wrong|not right|not true|incorrect|false|a mistake|not correct)[!|.]|(wrong|"
        "no, that is wrong|you made a mistake|you made an error|not correct|incorrect)[!|.]",
        ("I am sorry. I am tiny and make mistakes. Please check it yourself.",),
    ),
    ("(sorry|i am sorry|i'm sorry|excuse me|my mistake|pardon|oops)[!|.]", ("No problem! How can I help you?",)),
    (
        "(ok|okay|i see|alright|all right|fine|got it|understood|right|sure|cool|nice|interesting|wow|great|"
        "good|hm|hmm|"
        "aha|oh|good to know|that is interesting|that's nice|amazing|haha|lol|very interesting)[!|.]",
        ("What else would you like to know?",),
    ),
    ("(yes|yes please|yeah|yep|of course|yes, please|please do)[!|.]", ("Good. What would you like to know?",)),
    ("(no|nope|no thanks|no, thanks|no thank you|not now|nothing|never mind|no thank you, that is all|that is "
    "all)[!|.]", (
        "All right. I am here if you need me.",
    )),
    ("(why|why not|how so|how come|what do you mean|what|huh|pardon|come again|what does that mean)?", (
        "I am not sure what you mean. Please ask me again in other words.",
    )),
    ("(can i|may i) ask (you |)(something|a question|you something)?|(i have a question|one question|a question)[.]", (
        "Of course. What would you like to know?",
    )),
    ("(let's talk|let us talk|talk to me|can we talk|i want to talk|chat with me|say something|let's chat|tell me "
     "something)[.|?|!]", ("I would like that. Tell me: how was your day?",)),
    ("(say hello|say hi)[.]", ("Hello!",)),
    ("say (goodbye|bye)[.]", ("Goodbye!",)),
)  # fmt: skip
GOODBYES = (
    (
        "(bye|goodbye|bye bye|see you|see you later|good bye|i have to go|i must go|i am leaving|see you tomorrow|"
        "take care|farewell|cu|until next time|have a nice day|bye for now|i will go now)[!|.|, demo.]",
        ("Goodbye! It was nice to talk with you.",),
    ),
    ("(good night|sleep well|i am going to bed|i go to bed now|i'm going to sleep)[!|.]", ("Good night! Sleep well.",)),
    ("(exit|quit|end)[!|.]", ("Goodbye! It was nice to talk with you.",)),
)
WEATHER = (
    (
        "(what is|what's|how is|how's|tell me) the weather( today| now| tomorrow| like| in paris| in london| "
        "here|)?|(is it"
        " raining|will it rain|is it sunny|is it cold|is it warm|will it snow)[ today| tomorrow| now| outside]?",
        ("I can't see the weather. Please look out of the window.",),
    ),
    ("(it is|it's) (raining|rainy|wet)[ today| here| outside| again][.]", ("Then take an umbrella with you.",)),
    ("(it is|it's) (sunny|warm|nice|a nice day|a beautiful day)[ today| here| outside][.]", (
        "That sounds good! Enjoy the sun.",
    )),
    ("(it is|it's) (cold|snowing|very cold|icy)[ today| here| outside][.]", ("Then put on a warm coat.",)),
    ("(it is|it's) (hot|very hot|too hot)[ today| here| outside][.]", ("Then drink enough water and stay in the "
    "shade.",)),
    ("(it is|it's) (windy|stormy|cloudy|foggy)[ today| here| outside][.]", ("Then it may be nicer to stay inside.",)),
    ("do you like (the rain|the sun|rain|sunny weather|snow|the snow|bad weather)?", (
        "I am a program, so I feel no rain and no sun. Which weather do you like?",
    )),
    ("(what is|what's) (rain|snow|wind|a cloud|fog|a storm)?", (
        "That is a kind of weather. Rain and snow fall from clouds, and wind is air that moves.",
    )),
)  # fmt: skip
JOKES = (
    "Why did the token cross the road? To get to the next block.",
    "Why was six afraid of seven? Because seven, eight, nine.",
    "What do you call a bear without teeth? A gummy bear.",
    "What do you call a fish without eyes? A fsh.",
    "Why did the cache feel empty? Nobody gave it a block.",
    "Why do cows wear bells? Because their horns don't work.",
    "What has four wheels and flies? A garbage truck.",
    "What is orange and sounds like a parrot? A carrot.",
    "Why did the scheduler stay calm? It took one step at a time.",
    "Which word is spelled wrong in every dictionary? The word wrong.",
    "What gets wetter the more it dries? A towel.",
    "Why did the model go to school? It had too few parameters.",
)
JOKE = (
    "(tell me|tell|do you know|say|give me|make|i want|i want to hear) a [good |funny |short ]joke[, please|.|?]",
    "(can|could) you tell [me ]a joke?",
    "make me laugh[.]",
    "(joke|a joke, please|jokes)[.]",
    "(say|tell me) something funny[.]",
    "are you funny?",
)
ANOTHER = ("(another|another one|one more|one more joke|another joke|tell me another one|more)[, please|.|!]",)
LAUGH = ("(haha|lol|that was funny|very funny|ha ha|good one|funny)[!|.]",)
NOT_FUNNY = ("(that was not funny|not funny|i don't get it|that is not funny|bad joke)[.]",)


def exchanges(table: tuple[tuple[str, tuple[str, ...]], ...]) -> Skill:
    """A skill of one exchange from a table."""

    def skill(rng: Random, person: Person) -> list[Turn]:
        template, answers = rng.choice(table)
        return [Turn(ask(rng, template), rng.choice(answers))]

    return skill


greeting, mood, manners, weather = map(exchanges, (GREETINGS, MOODS, MANNERS, WEATHER))


def goodbye(rng: Random, person: Person) -> list[Turn]:
    """A goodbye, with the name if known."""
    (turn,) = exchanges(GOODBYES)(rng, person)
    return [Turn(turn.user, turn.answer.replace("!", f", {person.name}!", 1) if person.name else turn.answer)]


def joke(rng: Random, person: Person) -> list[Turn]:
    """One or more jokes, with a reaction."""
    told = rng.sample(JOKES, rng.choice((1, 1, 1, 2, 3)))
    turns = [Turn(ask(rng, rng.choice(JOKE)), told[0])]
    turns += [Turn(ask(rng, rng.choice(ANOTHER)), text) for text in told[1:]]
    if rng.random() < 0.2:
        turns.append(Turn(ask(rng, LAUGH[0]), "I am glad that you liked it."))
    elif rng.random() < 0.1:
        turns.append(Turn(ask(rng, NOT_FUNNY[0]), "I am sorry. I am still learning to be funny."))
    return turns


def how_are_you(rng: Random, person: Person) -> list[Turn]:
    """The usual beginning of a conversation."""
    how = GREETINGS[4]
    turns = [Turn(ask(rng, how[0]), how[1][0])]
    if rng.random() < 0.6:
        template, answers = rng.choice((MOODS[1], MOODS[2], MOODS[1], MOODS[3], MOODS[5]))
        turns.append(Turn(ask(rng, template), answers[0]))
    return turns
