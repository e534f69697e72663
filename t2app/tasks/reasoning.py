"""Small puzzles in words: which is larger, who is the tallest of three, what comes next, what does not belong.

A problem is one question about one set of things; both its directions ("larger", "smaller") and all orders in which its
facts can be told are in the same split, so that what is tested was not seen the other way round.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cache

from t2app.categories import CATEGORIES
from t2app.tasks.numbers import last_number
from t2app.tasks.procedural import check_split, pick, sample, split_of
from t2app.tasks.task import SPLITS, Example

_EXAMPLES_OF_EACH = {"train": 600, "validation": 100, "test": 200}

_LARGER = (
    "Which number is {word}, {a} or {b}? Reply with only the number.",
    "{a} or {b}: which of the two is {word}? Answer with just the number.",
    "Name the {word} of these two numbers: {a}, {b}. Give only the number.",
    "Look at {a} and {b}. Which one is {word}? Just the number, please.",
)
_NAMES = ("Anna", "Ben", "Carl", "Dora", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
# Comparative, superlative, and the superlative of the other end.
_RELATIONS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
)
_ORDERING = (
    "{facts} Who is the {end}? Reply with only the name.",
    "{facts} Which of the three is the {end}? Answer with just the name.",
    "Read this: {facts} Name the {end} one. Give only the name.",
)
_SEQUENCE = (
    "What number comes next: {shown}? Reply with only the number.",
    "Continue the sequence {shown}. Give only the next number.",
    "{shown}, … Which number follows? Answer with just the number.",
)
_KINDS = {
    "fruit": ("apple", "banana", "cherry", "grape", "lemon", "peach", "pear", "plum"),
    "animal": ("cat", "cow", "dog", "goat", "horse", "lion", "pig", "sheep"),
    "tool": ("drill", "hammer", "ladder", "saw", "screwdriver", "shovel", "axe", "wrench"),
    "colour": ("black", "blue", "brown", "green", "purple", "red", "white", "yellow"),
    "vehicle": ("bicycle", "boat", "bus", "car", "plane", "ship", "train", "truck"),
    "clothing": ("coat", "dress", "gloves", "hat", "scarf", "shirt", "shoes", "socks"),
}
_ODD = (
    "Which word does not belong with the others: {words}? Reply with only the word.",
    "{words}: one of these is of another kind. Answer with just that word.",
    "Find the odd one out among {words}. Give only the word.",
)


class ReasoningBasics:
    """Four families of puzzles in equal parts, each problem asked once, in one of several wordings."""

    name = "reasoning-basics"
    label = "reasoning"
    description = CATEGORIES[label]
    max_new_tokens = 16

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split."""
        check_split(split)
        return _examples()[split]

    def is_right(self, example: Example, answer: str) -> bool:
        """Of the options the right one must be named and no other; without options the last number counts."""
        if not example.options:
            return last_number(answer) == last_number(example.answer)
        words = set(re.findall(r"\w+", answer.lower()))
        return words & {option.lower() for option in example.options} == {example.answer.lower()}


@cache
def _examples() -> dict[str, list[Example]]:
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for family in (_comparisons, _orderings, _sequences, _odd_ones_out):
        by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for key, example in family():
            by_split[split_of((family.__name__, *key))].append(example)
        for split, count in _EXAMPLES_OF_EACH.items():
            examples[split] += sample(by_split[split], count)
    return {split: sample(made, len(made)) for split, made in examples.items()}


# Each family yields what a problem's split depends on, and the problem.


def _comparisons() -> Iterator[tuple[tuple, Example]]:
    for low, high in itertools.combinations(range(1, 100), 2):
        for word, answer in (("larger", high), ("smaller", low)):
            key = (low, high, word)
            a, b = (low, high) if pick((True, False), ("low first", *key)) else (high, low)
            wording = pick(_LARGER, key)
            yield (low, high), _choice(wording.format(word=word, a=a, b=b), str(answer), (str(low), str(high)))


def _orderings() -> Iterator[tuple[tuple, Example]]:
    for names in itertools.permutations(_NAMES, 3):
        for comparative, most, least in _RELATIONS:
            first, second, third = names
            facts = [f"{first} is {comparative} than {second}.", f"{second} is {comparative} than {third}."]
            for end, answer in ((most, first), (least, third)):
                key = (*names, end)
                told = " ".join(facts if pick((True, False), ("as they are", *key)) else facts[::-1])
                prompt = pick(_ORDERING, key).format(facts=told, end=end)
                yield (comparative, *sorted(names)), _choice(prompt, answer, names)


def _sequences() -> Iterator[tuple[tuple, Example]]:
    for start in range(0, 41):
        for step in range(1, 13):
            shown = ", ".join(str(start + step * i) for i in range(4))
            answer = str(start + step * 4)
            yield (start, step), Example(pick(_SEQUENCE, (start, step)).format(shown=shown), answer, answer)


def _odd_ones_out() -> Iterator[tuple[tuple, Example]]:
    for kind, other in itertools.permutations(_KINDS, 2):
        for three in itertools.combinations(_KINDS[kind], 3):
            key = (kind, other, *three)
            odd = pick(_KINDS[other], key)
            words = list(three)
            words.insert(pick(range(4), ("place", *key)), odd)
            prompt = pick(_ODD, key).format(words=", ".join(words))
            yield (*three, odd), _choice(prompt, odd, (*three, odd))


def _choice(prompt: str, answer: str, options: tuple[str, ...]) -> Example:
    return Example(prompt, answer, answer, options)
