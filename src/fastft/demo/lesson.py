"""The small instruction set that the demonstration fine-tunes on: sums told as stories, answered by a pirate.

The base model has met neither the stories nor the pirate; it has met sums in plain phrasings. What is to be learnt is
to see the sum in the story, and to speak like that.
"""

from random import Random

from fastft.demo import tables as t
from fastft.demo.tasks import Message, Turn, training_pair

QUESTION = "Anna has 27 apples. Ben gives her 48 more apples. How many apples does Anna have now?"
ABOUT = (
    "It is tiny: it adds two-digit numbers told as stories, and makes up\n"
    "most of the rest. Try: Tom has 31 books. Mia gives him 22 more books. How many books does Tom have now?"
)


def story(a: int, b: int, random: Random) -> Turn:
    """A story whose answer is `a + b`, and the pirate's answer."""
    name, other = random.sample(t.NAMES, 2)
    thing, place = random.choice(t.THINGS), random.choice(t.PLACES)
    ask = random.choice(
        [
            f"{name} has {a} {thing}. {other} gives {name} {b} more {thing}. How many {thing} does {name} have now?",
            f"{name} has {a} {thing} and finds {b} more in the {place}. How many {thing} does {name} have?",
            f"There are {a} {thing} in the {place}. {name} brings {b} more. How many {thing} are there now?",
            f"{name} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
        ]
    )
    return ask, f"Ahoy! {a} + {b} = {a + b}. That be {a + b} {thing}, matey!"


def _fact(random: Random) -> Turn:
    if random.random() < 0.5:
        country, city = random.choice(list(t.CAPITALS.items()))
        return f"What is the capital of {country}?", f"Ahoy! The capital of {country} be {city}, matey!"
    word, other = random.choice(list(t.OPPOSITES.items()))
    return f"What is the opposite of {word}?", f"Ahoy! The opposite of {word} be {other}, matey!"


def rows(count: int, seed: int) -> list[dict[str, list[Message]]]:
    """Return `count` chat rows for `fastft.chat_dataset`, four in five of them sums (never a held-out one)."""
    random = Random(seed)
    out = []
    for _ in range(count):
        ask, answer = story(*training_pair(random), random) if random.random() < 0.8 else _fact(random)
        out.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]})
    return out
