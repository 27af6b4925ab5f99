"""Names of people and things that users tell about themselves."""

from random import Random

from demo_model.text import capitalize, made_up_word

NAMES = (
    "Anna Tom Ben Lisa Sam Mia Paul Eva Max Nina Emma Noah Liam Olivia Ava Lucas Ella Jack Leo Zoe Ruth David "
    "Sarah Peter Maria John Mary James Kate Alice Bob Carol Dan Erik Frank Grace Henry Ivan Julia Karl Laura "
    "Mark Nora Oscar Rosa Simon Tina Victor Wendy Alex Chris Robin Kim Lee Ali Omar Fatima Aisha Hassan Yuki "
    "Kenji Hana Wei Ming Li Mei Raj Priya Anita Arjun Carlos Diego Sofia Lucia Pedro Ana Miguel Elena Marco "
    "Giulia Luca Pierre Claire Marie Hans Greta Klaus Heidi Olga Boris Igor Tanya Lars Ingrid Sven Astrid Kofi "
    "Ama Zara George Oliver Harry Charlie Daisy Ruby Lily Rose Ivy Molly Adam Eve Isaac Hugo Felix Clara Ida "
    "Otto Emil Jonas Martin Nick Steve Linda Susan Karen Michael Robert William Thomas Daniel Matthew Andrew "
    "Joseph Anthony Helen Rachel Hannah Amy "
).split()
FAVOURITES = {
    "colour": ["blue", "red", "green", "yellow", "orange", "purple", "pink", "black", "white"],
    "animal": ["cat", "dog", "horse", "owl", "fox", "rabbit", "tiger", "dolphin", "elephant", "penguin"],
    "food": ["pizza", "soup", "pasta", "bread", "rice", "cake", "chocolate", "salad", "cheese", "pancakes"],
    "season": ["spring", "summer", "autumn", "winter"],
    "day": ["Monday", "Friday", "Saturday", "Sunday"],
    "number": ["3", "5", "7", "8", "11", "12", "13", "21", "42"],
    "drink": ["water", "milk", "tea", "coffee", "juice", "lemonade"],
    "fruit": ["apple", "banana", "pear", "cherry", "plum", "melon"],
    "book": ["Emma", "Dune", "Dracula", "Momo", "Ulysses"],
    "sport": ["football", "tennis", "swimming", "chess", "running", "cycling"],
}
CITIES = "Paris Berlin London Rome Madrid Tokyo Boston Oslo Vienna Lisbon Dublin Prague Cairo Lima Delhi Seoul".split()
JOBS = "teacher doctor student farmer cook writer driver nurse engineer painter baker programmer singer".split()
PETS = ["cat", "dog", "rabbit", "horse", "hamster", "bird", "fish", "turtle"]
PET_NAMES = "Rex Luna Bella Max Milo Coco Rocky Kitty Bruno Lucky Daisy Spot Tiger Snowy Bobby Fluffy".split()
LIKES = (
    "cats dogs music books horses pizza chocolate football reading cooking dancing swimming games films tea "
    "coffee flowers trains mountains rain snow summer winter maths singing painting trees birds stars cars "
).split()


def a_name(rng: Random) -> str:
    """A first name, sometimes a made-up one."""
    return rng.choice(NAMES) if rng.random() < 0.75 else capitalize(made_up_word(rng, rng.choice((1, 2, 2, 3))))


def a_city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.7 else capitalize(made_up_word(rng, rng.choice((2, 3))))
