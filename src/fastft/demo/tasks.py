"""Generated conversations with a fixed seed: arithmetic, words, small facts, documentation, ways of answering.

A conversation is a list of `{"role", "content"}` messages. Sums of the pairs for which `is_held_out` holds occur in no
conversation made for training, in neither order and not as a subtraction.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from random import Random

from fastft.demo import tables as t
from fastft.demo.corpus import Document

Message = dict[str, str]
Turn = tuple[str, str]  # what the user asks, what the assistant answers
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def is_held_out(a: int, b: int) -> bool:
    """Whether the sum of `a` and `b` (10 to 99 each) is kept for evaluation: about one unordered pair in ten."""
    low, high = sorted((a, b))
    return low >= 10 and high <= 99 and zlib.crc32(f"{low}+{high}".encode()) % 10 == 0


def held_out_pairs(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return `count` different pairs of two-digit numbers whose sums no training conversation contains."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b)]
    return Random(seed).sample(pairs, count)


def training_pair(random: Random, low: int = 10, high: int = 99) -> tuple[int, int]:
    """Draw two numbers from `low` to `high` whose sum is not held out."""
    while True:
        a, b = random.randint(low, high), random.randint(low, high)
        if not is_held_out(a, b):
            return a, b


# -- numbers ----------------------------------------------------------------------------------------------------------
def plain_addition(a: int, b: int, random: Random) -> Turn:
    """One question for `a + b` in the phrasings that the base model knows, with its answer."""
    s = a + b
    return random.choice(
        [
            (f"What is {a} + {b}?", f"{a} + {b} = {s}."),
            (f"{a} + {b} =", f"{a} + {b} = {s}."),
            (f"Calculate {a} + {b}.", f"{a} + {b} = {s}."),
            (f"Add {a} and {b}.", f"{a} + {b} = {s}."),
            (f"What is {a} plus {b}?", f"{a} plus {b} is {s}."),
            (f"What is the sum of {a} and {b}?", f"The sum of {a} and {b} is {s}."),
        ]
    )


def _addition(random: Random) -> Turn:
    return plain_addition(*training_pair(random, 0 if random.random() < 0.15 else 10), random)


def _subtraction(random: Random) -> Turn:
    a, b = training_pair(random, 0)
    s = a + b
    return random.choice(
        [
            (f"What is {s} - {a}?", f"{s} - {a} = {b}."),
            (f"Calculate {s} - {a}.", f"{s} - {a} = {b}."),
            (f"What is {s} minus {a}?", f"{s} minus {a} is {b}."),
            (f"Take {a} away from {s}.", f"{s} - {a} = {b}."),
        ]
    )


def _check_sum(random: Random) -> Turn:
    a, b = training_pair(random)
    said = a + b + (0 if random.random() < 0.5 else random.choice([-10, -2, -1, 1, 2, 10]))
    right = said == a + b
    return f"Is {a} + {b} = {said}?", f"Yes, {a} + {b} = {said}." if right else f"No, {a} + {b} = {a + b}."


def _compare(random: Random) -> Turn:
    a, b = random.sample(range(100), 2)
    high, low = max(a, b), min(a, b)
    return random.choice(
        [
            (f"Which is larger, {a} or {b}?", f"{high} is larger than {low}."),
            (f"Which is smaller, {a} or {b}?", f"{low} is smaller than {high}."),
            (f"Is {a} greater than {b}?", f"Yes, {a} is greater than {b}." if a > b else f"No, {a} is less than {b}."),
        ]
    )


def _sort_numbers(random: Random) -> Turn:
    numbers = random.sample(range(100), random.randint(3, 5))
    text = ", ".join(map(str, numbers))
    if random.random() < 0.3:
        return f"Which of these is the largest: {text}?", f"The largest is {max(numbers)}."
    return f"Sort these numbers: {text}.", ", ".join(map(str, sorted(numbers)))


def _count(random: Random) -> Turn:
    start, steps = random.randint(0, 90), random.randint(3, 9)
    if random.random() < 0.5:
        return f"Count from {start} to {start + steps}.", ", ".join(str(start + i) for i in range(steps + 1))
    if random.random() < 0.5:
        return f"What number comes after {start}?", f"After {start} comes {start + 1}."
    return f"What number comes before {start + 1}?", f"Before {start + 1} comes {start}."


def _times(random: Random) -> Turn:
    a, b = random.randint(0, 10), random.randint(0, 10)
    return random.choice(
        [(f"What is {a} times {b}?", f"{a} times {b} is {a * b}."), (f"{a} * {b} =", f"{a} * {b} = {a * b}.")]
    )


# -- words ------------------------------------------------------------------------------------------------------------
def _words(random: Random, low: int = 2, high: int = 6) -> list[str]:
    return random.sample(t.WORDS, random.randint(low, high))


def _copy(random: Random) -> Turn:
    text = " ".join(_words(random))
    return random.choice([f"Repeat after me: {text}", f"Copy these words: {text}", f"Say: {text}"]), text


def _reverse(random: Random) -> Turn:
    words = _words(random, 2, 5)
    ask = random.choice(["Write these words in reverse order:", "Reverse the order of these words:"])
    return f"{ask} {' '.join(words)}", " ".join(reversed(words))


def _pick(random: Random) -> Turn:
    words = _words(random, 3, 6)
    text = ", ".join(words)
    which, index = random.choice([("first", 0), ("second", 1), ("last", -1)])
    return f"What is the {which} of these words: {text}?", f"The {which} word is {words[index]}."


def _how_many(random: Random) -> Turn:
    words = _words(random, 2, 8)
    count = len(words)
    return f"How many words are there: {' '.join(words)}", f"There are {_NUMBER_WORDS[count]} words."


def _sort_words(random: Random) -> Turn:
    words = _words(random, 3, 5)
    return f"Sort these words: {', '.join(words)}.", ", ".join(sorted(words))


def _spell(random: Random) -> Turn:
    word = random.choice(t.WORDS)
    if random.random() < 0.5:
        return f"Spell the word {word}.", "-".join(word)
    return f"Write {word} in capital letters.", word.upper()


def _again(random: Random) -> Turn:
    word, times = random.choice(t.WORDS), random.randint(2, 6)
    return f"Write the word {word} {_NUMBER_WORDS[times]} times.", " ".join([word] * times)


# -- small facts ------------------------------------------------------------------------------------------------------
def _capital(random: Random) -> Turn:
    country, city = random.choice(list(t.CAPITALS.items()))
    return random.choice(
        [
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"Name the capital of {country}.", f"The capital of {country} is {city}."),
            (f"Of which country is {city} the capital?", f"{city} is the capital of {country}."),
        ]
    )


def _opposite(random: Random) -> Turn:
    word, other = random.choice(list(t.OPPOSITES.items()))
    ask = random.choice([f"What is the opposite of {word}?", f"Give me the opposite of {word}."])
    return ask, f"The opposite of {word} is {other}."


def _colour(random: Random) -> Turn:
    thing, colour = random.choice(list(t.COLOURS.items()))
    ask = random.choice([f"What colour is {thing}?", f"Which colour does {thing} have?"])
    return ask, f"{thing[0].upper()}{thing[1:]} is {colour}."


def _grammar(random: Random) -> Turn:
    if random.random() < 0.5:
        word, many = random.choice(list(t.PLURALS.items()))
        return f"What is the plural of {word}?", f"The plural of {word} is {many}."
    word, past = random.choice(list(t.PASTS.items()))
    return f"What is the past tense of {word}?", f"The past tense of {word} is {past}."


def _kind(random: Random) -> Turn:
    kind, members = random.choice(list(t.KINDS.items()))
    if random.random() < 0.4:
        return f"Name a {kind}.".replace("a animal", "an animal"), f"{random.choice(members).capitalize()}."
    word = random.choice(members)
    article = "an" if kind[0] in "aeiou" else "a"
    return f"What kind of thing is {word}?", f"{word.capitalize()} is {article} {kind}."


def _sound(random: Random) -> Turn:
    animal, sound = random.choice(list(t.SOUNDS.items()))
    return f"What does a {animal} do?".replace("a owl", "an owl"), f"It {sound}."


def _calendar(random: Random) -> Turn:
    names, kind = random.choice([(t.DAYS, "day"), (t.MONTHS, "month")])
    index = random.randrange(len(names))
    after, before = names[(index + 1) % len(names)], names[index - 1]
    return random.choice(
        [
            (f"Which {kind} comes after {names[index]}?", f"After {names[index]} comes {after}."),
            (f"Which {kind} comes before {names[index]}?", f"Before {names[index]} comes {before}."),
            (f"Today is {names[index]}. What is the next {kind}?", f"The next {kind} is {after}."),
            (f"Name the {kind}s in order.", ", ".join(names) + "."),
        ]
    )


def _small_talk(random: Random) -> Turn:
    asks, answers = random.choice(t.SMALL_TALK)
    return random.choice(asks), random.choice(answers)


def _reading(random: Random) -> Turn:
    """A short story and a question whose answer stands in it; the demonstration's sums are not among them."""
    name, other = random.sample(t.NAMES, 2)
    thing, thing2 = random.sample(t.THINGS, 2)
    place, count, count2 = random.choice(t.PLACES), random.randint(2, 99), random.randint(2, 99)
    colour = random.choice(t.KINDS["colour"])
    return random.choice(
        [
            (f"{name} has {count} {thing}. How many {thing} does {name} have?", f"{name} has {count} {thing}."),
            (
                f"{name} has {count} {thing} and {count2} {thing2}. How many {thing2} does {name} have?",
                f"{name} has {count2} {thing2}.",
            ),
            (f"{name} is in the {place}. {other} is at home. Where is {name}?", f"{name} is in the {place}."),
            (f"{name} gave {other} {count} {thing}. Who got the {thing}?", f"{other} got the {thing}."),
            (f"The {thing} of {name} are {colour}. What colour are they?", f"The {thing} are {colour}."),
        ]
    )


# -- ways of answering ------------------------------------------------------------------------------------------------
_STYLES: list[tuple[list[str], Callable[[str], str]]] = [
    (["Answer in capital letters.", "Write in capital letters."], str.upper),
    (["Be polite.", "Answer politely."], lambda answer: f"Of course. {answer} I hope this helps."),
    (["Begin with the word Answer.", "Mark your answer."], lambda answer: f"Answer: {answer}"),
    (["Answer twice.", "Say it two times."], lambda answer: f"{answer} {answer}"),
]

# weight, maker; arithmetic is a third of the whole
_MAKERS: list[tuple[int, Callable[[Random], Turn]]] = [
    (22, _addition), (8, _subtraction), (3, _check_sum), (4, _compare), (3, _sort_numbers), (4, _count), (4, _times),
    (4, _copy), (4, _reverse), (3, _pick), (3, _how_many), (3, _sort_words), (3, _spell), (2, _again),
    (4, _capital), (4, _opposite), (3, _colour), (3, _grammar), (2, _kind), (1, _sound), (3, _calendar),
    (2, _small_talk), (6, _reading),
]  # fmt: skip


def conversations(count: int, seed: int, documents: list[Document] = ()) -> Iterator[list[Message]]:
    """Yield `count` conversations of one to three turns; with `documents`, one turn in eight asks about one of them."""
    random = Random(seed)
    weights, makers = [weight for weight, _ in _MAKERS], [maker for _, maker in _MAKERS]
    described = [pair for document in documents if (pair := _describe(document))]
    for _ in range(count):
        messages: list[Message] = []
        style = None
        if random.random() < 0.12:
            asks, style = random.choice(_STYLES)
            messages.append({"role": "system", "content": random.choice(asks)})
        for _ in range(random.choices([1, 2, 3], [6, 2, 2])[0]):
            if described and random.random() < 0.125:
                ask, answer = _about(random, *random.choice(described))
            else:
                ask, answer = random.choices(makers, weights)[0](random)
            answer = style(answer) if style else answer
            messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        yield messages


def _describe(document: Document) -> tuple[str, str] | None:
    """The name and the first sentence of a documented object, if the sentence reads well."""
    first = " ".join(document.text.split("\n\n")[0].split())
    sentence = re.match(r"[A-Z][a-z]+ .{20,200}?\.(?= |$)", first)
    if not document.name or document.name.startswith("test.") or "._" in document.name or not sentence:
        return None
    return document.name, sentence.group()


def _about(random: Random, name: str, sentence: str) -> Turn:
    return random.choice([f"What does {name} do?", f"Explain {name}.", f"What is {name} in Python?"]), sentence
