"""Writes the texts and dialogues of a tiny world: the data of the examples.

    python examples/data/world.py [FOLDER]

Everything that a text says agrees with `facts.py`, so that a tiny model can learn it, and a question about the world
has one right answer.

- Seeded: the same files on every run and on every machine.
- `held_out.txt` shares its grammars and facts with `world.txt`, but no line.
- `identity.jsonl`, beside this, is written by hand.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from facts import (
    DAYS,
    GOODS,
    ISLAND,
    NUMBERS,
    OPPOSITES,
    PLACES,
    SEASONS,
    THINGS,
    VALLEY,
    WEATHER,
    Land,
    many,
    one,
    title,
)

SEED = 7
LINES = {
    "portrait": 120,
    "search": 150,
    "meeting": 100,
    "market": 120,
    "counting": 150,
    "order": 50,
    "animal": 60,
    "question": 520,
}
ISLAND_LINES = {"portrait": 60, "search": 60, "meeting": 20, "market": 20, "animal": 20, "question": 60}

Grammar = Callable[[random.Random, Land], str]


def more(count: int, thing: str) -> str:
    """(3, "plum") -> "three more plums"."""
    number, _, things = many(count, thing).partition(" ")
    return f"{number} more {things}"


def portrait(rng: random.Random, land: Land) -> str:
    """Who someone is, in one of several orders."""
    p = rng.choice(land.people)
    says, sleeps, eats, _ = land.animals[p.pet]
    facts = [
        rng.choice((f"{title(p.she)} lives in {p.home}.", f"{title(p.her)} home is {p.home}.")),
        f"{title(p.she)} has a {p.colour} {p.pet} named {p.pet_name}.",
        rng.choice((f"{title(p.she)} likes {p.food} best.", f"For dinner {p.she} eats {p.food}.")),
        rng.choice((f"{title(p.her)} best friend is {p.friend}.", f"{p.friend} is {p.her} best friend.")),
        rng.choice((f"{p.pet_name} sleeps {sleeps}.", f"{p.pet_name} eats {eats}.", f"{p.pet_name} says {says}.")),
    ]
    rng.shuffle(facts)
    return f"{p.name} is {one(p.job)}. " + " ".join(facts[: rng.randint(3, 5)])


def search(rng: random.Random, land: Land) -> str:
    """Something is lost, looked for with an animal's help, and found: names, places and thing agree to the end."""
    p, other = rng.sample(land.people, 2)
    thing, weather, day = rng.choice(THINGS), rng.choice(list(WEATHER)), rng.choice(DAYS)
    wrong, right = rng.sample(PLACES, 2)
    says = land.animals[p.pet][0]
    start = f"On a {weather} {day} {p.name} the {p.job} lost {p.her} {thing}. {WEATHER[weather]}"
    look = f"{title(p.she)} looked {wrong}, but the {thing} was not there."
    turn = rng.choice(
        (
            f"Then {p.pet_name} the {p.pet} ran {right} and said {says}. There was the {thing}!",
            f"Then {other.name} the {other.job} came and looked {right}. There was the {thing}!",
        )
    )
    who = p.pet_name if p.pet_name in turn else other.name
    end = rng.choice(
        (
            f"{p.name} thanked {who} and went home to {p.home}.",
            f"{p.name} was happy and shared {p.her} {p.food} with {who}.",
        )
    )
    return " ".join((start, look, turn, end))


def meeting(rng: random.Random, land: Land) -> str:
    """People tell each other who they are, and who made what they carry."""
    p, other, maker = rng.sample(land.people, 3)
    thing, day = rng.choice(THINGS), rng.choice(DAYS)
    start = f"On {day} {p.name} met {other.name}. "
    asked = rng.choice(
        (
            f'"Who are you?" asked {other.name}. "I am {p.name}, {one(p.job)}," said {p.name}.',
            f'"What is your name?" asked {other.name}. "My name is {p.name}. I am {one(p.job)}," said {p.name}.',
            f'"Tell me who you are," said {other.name}. "I am {p.name}, and I live in {p.home}," said {p.name}.',
        )
    )
    made = rng.choice(
        (
            f' "Who made your {thing}?" "It was made by {maker.name} the {maker.job}."',
            f' "Who made this small {thing}?" "The team of the Lighthouse made it."',
            f' "Do you answer questions?" "Yes, I am an assistant of {maker.name}, and of the Lighthouse team."',
            "",
        )
    )
    return start + asked + made


def market(rng: random.Random, land: Land) -> str:
    """A bargain in which the numbers are right."""
    p, other = rng.sample(land.people, 2)
    good, day = rng.choice(list(GOODS)), rng.choice(DAYS)
    first = rng.randint(2, 9)
    if rng.random() < 0.5:
        second = rng.randint(1, 12 - first)
        verb, total = rng.choice((("found", first + second), ("bought", first + second)))
        deal = f"Then {p.she} {verb} {more(second, good)}."
    else:
        second = rng.randint(1, first - 1)
        verb, total = rng.choice((("gave", first - second), ("sold", first - second)))
        deal = f"Then {p.she} {verb} {many(second, good)} to {other.name}."
    start = f"On {day} {p.name} came to the market with {many(first, good)}."
    colour = f" The {good}s were {GOODS[good]}." if rng.random() < 0.4 else ""
    return f"{start}{colour} {deal} Now {p.she} has {many(total, good)}."


def counting(rng: random.Random, _: Land) -> str:
    """Counting up or down, adding, taking away, comparing."""
    kind = rng.randrange(4)
    low = rng.randint(0, 7)
    high = rng.randint(low + 2, min(low + 6, 12))
    a, b = rng.randint(1, 6), rng.randint(1, 6)
    if kind == 0:
        steps = ", ".join(NUMBERS[low : high + 1])
        return f"{rng.choice(('Count up', 'We count'))} from {NUMBERS[low]} to {NUMBERS[high]}: {steps}."
    if kind == 1:
        steps = ", ".join(reversed(NUMBERS[low : high + 1]))
        return f"{rng.choice(('Count down', 'We count down'))} from {NUMBERS[high]} to {NUMBERS[low]}: {steps}."
    if kind == 2:
        good = rng.choice(list(GOODS))
        return f"{title(many(a, good))} and {many(b, good)} make {many(a + b, good)}."
    left, right, total = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
    return f"{title(left)} plus {right} is {total}, and {total} minus {right} is {left}."


def order(rng: random.Random, _: Land) -> str:
    """What comes after what, and what is the opposite of what."""
    kind = rng.randrange(3)
    if kind == 0:
        start, length = rng.randrange(7), rng.randint(3, 6)
        days = [DAYS[(start + i) % 7] for i in range(length)]
        return f"{title(NUMBERS[length])} days in order: {', '.join(days)}."
    if kind == 1:
        start = rng.randrange(4)
        seasons = [SEASONS[(start + i) % 4] for i in range(4)]
        return f"After {seasons[0]} comes {seasons[1]}, after {seasons[1]} comes {seasons[2]}, and then {seasons[3]}."
    first, second = rng.sample(list(OPPOSITES), 2)
    return f"{title(first)} is not {OPPOSITES[first]}, and {second} is not {OPPOSITES[second]}."


def animal(rng: random.Random, land: Land) -> str:
    """What an animal does, in one of several orders."""
    kind = rng.choice(list(land.animals))
    says, sleeps, eats, legs = land.animals[kind]
    facts = [f"It says {says}.", f"It sleeps {sleeps}.", f"It eats {eats}.", f"It has {legs} legs."]
    rng.shuffle(facts)
    return f"{title(one(kind))} is an animal. " + " ".join(facts[: rng.randint(2, 4)])


def question(rng: random.Random, land: Land) -> str:
    """A question and its answer, as they stand in a book or as people speak."""
    asked, answer = rng.choice(rng.choice(land.questions))
    return f"Question: {asked} Answer: {answer}" if rng.random() < 0.3 else f'"{asked}" "{answer}"'


GRAMMARS: Mapping[str, Grammar] = {
    "portrait": portrait,
    "search": search,
    "meeting": meeting,
    "market": market,
    "counting": counting,
    "order": order,
    "animal": animal,
    "question": question,
}


def lines(rng: random.Random, land: Land, counts: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The lines to learn from and the held-out ones (every tenth of each grammar), shuffled; no line stands twice."""
    train: list[str] = []
    held_out: list[str] = []
    for name, count in counts.items():
        made: dict[str, None] = {}
        for _ in range(count * 20):
            made.setdefault(GRAMMARS[name](rng, land))
            if len(made) == count:
                break
        for place, line in enumerate(made):
            (held_out if place % 10 == 9 else train).append(line)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def general(rng: random.Random, count: int) -> list[Mapping[str, Any]]:
    """Dialogues about the world, one question or two, as rows of the openai form."""
    rows: dict[str, Mapping[str, Any]] = {}
    while len(rows) < count:
        messages = []
        for group in rng.sample(VALLEY.questions, 1 if rng.random() < 0.8 else 2):
            asked, answer = rng.choice(group)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.setdefault(json.dumps(messages), {"messages": messages})
    return list(rows.values())


def desk(rng: random.Random, count: int) -> list[Mapping[str, Any]]:
    """Notes of the valley's lost-property desk: rows of a shape of their own (examples/own_dataset)."""
    rows: dict[str, Mapping[str, Any]] = {}
    while len(rows) < count:
        p, thing, place, day = rng.choice(VALLEY.people), rng.choice(THINGS), rng.choice(PLACES), rng.choice(DAYS)
        talk = [
            {"by": "visitor", "says": rng.choice((f"I lost my {thing}.", f"Where is my {thing}?"))},
            {"by": "clerk", "says": "Who are you, and where did you lose it?"},
            {"by": "visitor", "says": f"I am {p.name} the {p.job}. I lost it {place}."},
            {
                "by": "clerk",
                "says": f"Good day, {p.name}. The {thing} was found {place} on {day}. Please take it home.",
            },
        ]
        note = {"day": day, "visitor": {"name": p.name, "job": p.job}, "talk": talk}
        rows.setdefault(json.dumps(talk), note)
    return list(rows.values())


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path) -> None:
    """Writes every file of the world into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = lines(random.Random(SEED), VALLEY, LINES)
    island, island_held_out = lines(random.Random(SEED + 3), ISLAND, ISLAND_LINES)
    texts = {"world": train, "held_out": held_out, "island": island, "island_held_out": island_held_out}
    for name, part in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    dialogues = general(random.Random(SEED + 1), 280)
    write_rows(folder / "general.jsonl", dialogues[:240])
    write_rows(folder / "general_held_out.jsonl", dialogues[240:])
    write_rows(folder / "desk.jsonl", desk(random.Random(SEED + 2), 60))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
