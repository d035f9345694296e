"""What is true in the tiny world: twelve people of a valley, their animals, fruit, days, numbers; what can be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Pair = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True, slots=True)
class Person:
    """Someone of the valley, and what is true of them."""

    name: str
    she: str
    her: str
    job: str
    home: str
    pet: str
    pet_name: str
    colour: str
    food: str
    friend: str


PEOPLE = (
    Person("Mira", "she", "her", "baker", "the old mill", "cat", "Pip", "grey", "honey bread", "Tom"),
    Person("Tom", "he", "his", "fisher", "the boat house", "dog", "Bell", "brown", "fish soup", "Mira"),
    Person("Nora", "she", "her", "teacher", "the red house", "bird", "Kit", "yellow", "apple cake", "Sam"),
    Person("Sam", "he", "his", "farmer", "the long barn", "horse", "Duke", "black", "warm milk", "Nora"),
    Person("Lena", "she", "her", "doctor", "the white house", "rabbit", "Snow", "white", "carrot soup", "Otto"),
    Person("Otto", "he", "his", "miller", "the stone house", "goat", "Rosie", "brown", "corn bread", "Lena"),
    Person("Ida", "she", "her", "painter", "the tall tower", "owl", "Moss", "grey", "plum jam", "Paul"),
    Person("Paul", "he", "his", "smith", "the forge", "duck", "Puddle", "green", "bean stew", "Ida"),
    Person("Rita", "she", "her", "gardener", "the green hut", "hen", "Dot", "red", "pea soup", "Ben"),
    Person("Ben", "he", "his", "shepherd", "the hill farm", "sheep", "Cloud", "white", "goat cheese", "Rita"),
    Person("Zoe", "she", "her", "sailor", "the blue boat", "frog", "Hop", "green", "rice and fish", "Max"),
    Person("Max", "he", "his", "tailor", "the corner shop", "mouse", "Tip", "grey", "nut cake", "Zoe"),
)
ISLANDERS = (
    Person("Yara", "she", "her", "diver", "the lake house", "otter", "Reed", "brown", "mussel soup", "Finn"),
    Person("Finn", "he", "his", "glass blower", "the sand hut", "crab", "Button", "red", "sea bread", "Yara"),
    Person("Oda", "she", "her", "light keeper", "the lighthouse", "gull", "Salt", "white", "egg pie", "Levi"),
    Person("Levi", "he", "his", "net maker", "the rope shed", "turtle", "Walnut", "green", "berry jam", "Oda"),
)
"""Who lives on the island in the lake; the valley's texts never speak of them."""
ANIMALS = {
    "cat": ("meow", "in a basket", "fish", "four"),
    "dog": ("woof", "by the door", "meat", "four"),
    "bird": ("tweet", "in a nest", "seeds", "two"),
    "horse": ("neigh", "in the stable", "hay", "four"),
    "rabbit": ("squeak", "in a hole", "carrots", "four"),
    "goat": ("maa", "in the shed", "leaves", "four"),
    "owl": ("hoo", "in a tree", "mice", "two"),
    "duck": ("quack", "by the pond", "bread", "two"),
    "hen": ("cluck", "in the coop", "corn", "two"),
    "sheep": ("baa", "on the hill", "grass", "four"),
    "frog": ("croak", "under a leaf", "flies", "four"),
    "mouse": ("peep", "in the wall", "cheese", "four"),
}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SEASONS = ["spring", "summer", "autumn", "winter"]
GOODS = {"apple": "red", "pear": "green", "plum": "blue", "lemon": "yellow", "carrot": "orange", "egg": "white"}
THINGS = ("hat", "key", "book", "bell", "lamp", "cup", "shoe", "ring")
PLACES = (
    "under the bridge",
    "behind the barn",
    "in the tall grass",
    "near the well",
    "on the stone wall",
    "by the gate",
)
ISLAND_ANIMALS = {
    "otter": ("whee", "in the reeds", "fish", "four"),
    "crab": ("click", "under a stone", "weed", "eight"),
    "gull": ("kree", "on the roof", "fish", "two"),
    "turtle": ("hiss", "in the sand", "berries", "four"),
}
WEATHER = {
    "sunny": "The sun was warm.",
    "rainy": "The rain fell on the roofs.",
    "windy": "The wind shook the trees.",
    "cold": "There was ice on the pond.",
    "foggy": "Nobody could see the hill.",
}
OPPOSITES = {
    "big": "small",
    "hot": "cold",
    "day": "night",
    "old": "young",
    "wet": "dry",
    "fast": "slow",
    "up": "down",
    "open": "closed",
    "full": "empty",
    "early": "late",
}


def title(text: str) -> str:
    """`text` with its first letter large; the rest stays."""
    return text[:1].upper() + text[1:]


def many(count: int, thing: str) -> str:
    """(1, "plum") -> "one plum"; (3, "plum") -> "three plums"."""
    return f"{NUMBERS[count]} {thing}" + ("" if count == 1 else "s")


def one(thing: str) -> str:
    """ "owl" -> "an owl"; "hen" -> "a hen"."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def about_people(people: tuple[Person, ...]) -> Iterator[tuple[Pair, ...]]:
    """What can be asked about people, and the right answers; a group holds the ways to ask one thing."""
    for p in people:
        home = f"{p.name} lives in {p.home}."
        job = f"{p.name} is {one(p.job)}."
        pet = f"{p.name} has a {p.colour} {p.pet} named {p.pet_name}."
        food = f"{p.name} likes {p.food} best."
        yield (f"Where does {p.name} live?", home), (f"Where is the home of {p.name}?", home)
        yield (f"What is {p.name}?", job), (f"What does {p.name} do?", job)
        yield (f"What animal does {p.name} have?", pet), (f"Does {p.name} have an animal?", f"Yes. {pet}")
        yield (f"What does {p.name} eat?", food), (f"What food does {p.name} like?", food)
        yield ((f"Who is the best friend of {p.name}?", f"The best friend of {p.name} is {p.friend}."),)
        yield ((f"Who is {p.pet_name}?", f"{p.pet_name} is a {p.colour} {p.pet}, and belongs to {p.name}."),)


def about_animals(animals: Mapping[str, tuple[str, str, str, str]]) -> Iterator[tuple[Pair, ...]]:
    """What can be asked about kinds of animals."""
    for kind, (says, sleeps, eats, legs) in animals.items():
        a, big = one(kind), title(one(kind))
        yield (f"What does {a} say?", f"{big} says {says}."), (f"Which sound does {a} make?", f"{big} says {says}.")
        yield ((f"Where does {a} sleep?", f"{big} sleeps {sleeps}."),)
        yield ((f"What does {a} eat?", f"{big} eats {eats}."),)
        yield ((f"How many legs does {a} have?", f"{big} has {legs} legs."),)


def about_all() -> Iterator[tuple[Pair, ...]]:
    """What can be asked about fruit, days, seasons, opposites and sums."""
    for good, colour in GOODS.items():
        answer = f"The {good} is {colour}."
        yield (f"What colour is the {good}?", answer), (f"Which colour does the {good} have?", answer)
    for first, second in zip(DAYS, DAYS[1:] + DAYS[:1]):
        yield ((f"Which day comes after {first}?", f"After {first} comes {second}."),)
    for first, second in zip(SEASONS, SEASONS[1:] + SEASONS[:1]):
        yield ((f"What comes after {first}?", f"After {first} comes {second}."),)
    for first, second in OPPOSITES.items():
        yield ((f"What is the opposite of {first}?", f"The opposite of {first} is {second}."),)
    for left in range(1, 7):
        for right in range(1, 7):
            a, b, total = NUMBERS[left], NUMBERS[right], NUMBERS[left + right]
            yield ((f"What is {a} plus {b}?", f"{title(a)} plus {b} is {total}."),)


@dataclass(frozen=True, slots=True)
class Land:
    """A place of the world: who lives there, and what can be asked about it."""

    people: tuple[Person, ...]
    animals: Mapping[str, tuple[str, str, str, str]]
    questions: tuple[tuple[Pair, ...], ...]


VALLEY = Land(PEOPLE, ANIMALS, (*about_people(PEOPLE), *about_animals(ANIMALS), *about_all()))
ISLAND = Land(ISLANDERS, ISLAND_ANIMALS, (*about_people(ISLANDERS), *about_animals(ISLAND_ANIMALS)))
