"""Small Python functions on numbers, strings and lists, checked by running them.

A function is a chain of one or two steps, described in words and written in Python by the same entry of a table: what
is asked, what is right and a program that does it can't disagree. A chain is asked once, so it is in one split only.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from t2app.categories import CATEGORIES
from t2app.sandbox import run_tests
from t2app.tasks.procedural import check_split, pick, sample, split_of
from t2app.tasks.task import SPLITS, Example

_EXAMPLES = {"train": 1500, "validation": 240, "test": 600}
_WORDINGS = (
    "Write a Python function `{name}({argument})` that takes {given} and returns {wanted}.",
    "Define a function `{name}` in Python with one parameter `{argument}`, {given}. It returns {wanted}. "
    "Give only the code.",
    "Python: `{name}({argument})` gets {given} and returns {wanted}. Write it.",
    "Please write `def {name}({argument})`, a Python function that returns {wanted}, where `{argument}` is {given}.",
)
_NAMES = ("f", "solve", "compute", "result", "process", "apply", "answer", "convert")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class _Step:
    """One step of a chain: in words about {x}, as an expression in {x}, and what kind of value comes out."""

    words: str
    expression: str
    gives: str


@dataclass(frozen=True)
class _Kind:
    """A kind of argument: its name, how the prompt calls it, and values to test with."""

    argument: str
    given: str
    values: tuple[object, ...]


_KINDS = {
    "number": _Kind("n", "a whole number", (0, 1, 2, 7, 10, 25, -3, 100)),
    "string": _Kind("text", "a string", ("", "a", "hello", "Hello World", "racecar", "Python is fun", "AbC")),
    "list": _Kind(
        "numbers", "a list of whole numbers", ([1], [3, 1, 2], [5, 5, -1, 0], [10, 20, 30, 40], [-2, 8, 7, 7])
    ),
}


def _steps() -> dict[str, list[_Step]]:
    """The steps that each kind of value can take."""
    on_numbers = [
        *(_Step(f"{{x}} plus {k}", f"{{x}} + {k}", "number") for k in range(1, 13)),
        *(_Step(f"{{x}} minus {k}", f"{{x}} - {k}", "number") for k in range(1, 13)),
        *(_Step(f"{{x}} multiplied by {k}", f"{{x}} * {k}", "number") for k in range(2, 13)),
        _Step("the square of {x}", "{x} ** 2", "number"),
        _Step("the absolute value of {x}", "abs({x})", "number"),
        _Step("the string form of {x}", "str({x})", "string"),
        *(_Step(f"whether {{x}} is divisible by {k}", f"{{x}} % {k} == 0", "answer") for k in range(2, 13)),
        *(_Step(f"whether {{x}} is greater than {k}", f"{{x}} > {k}", "answer") for k in range(0, 30, 3)),
    ]
    on_strings = [
        _Step("{x} in upper case", "{x}.upper()", "string"),
        _Step("{x} in lower case", "{x}.lower()", "string"),
        _Step("{x} reversed", "{x}[::-1]", "string"),
        *(_Step(f"the first {k} characters of {{x}}", f"{{x}}[:{k}]", "string") for k in range(2, 7)),
        *(_Step(f"the last {k} characters of {{x}}", f"{{x}}[-{k}:]", "string") for k in range(2, 7)),
        *(_Step(f"{{x}} repeated {k} times", f"{{x}} * {k}", "string") for k in range(2, 6)),
        *(
            _Step(f"{{x}} with every '{a}' replaced by '{b}'", f"{{x}}.replace('{a}', '{b}')", "string")
            for a, b in (("a", "e"), ("o", "0"), ("l", "L"), (" ", "_"))
        ),
        *(_Step(f"the number of times '{a}' occurs in {{x}}", f"{{x}}.count('{a}')", "number") for a in "aelo"),
        *(_Step(f"whether {{x}} starts with '{a}'", f"{{x}}.startswith('{a}')", "answer") for a in "ahrP"),
        _Step("the length of {x}", "len({x})", "number"),
        _Step("the list of the words of {x}", "{x}.split()", "words"),
    ]
    on_lists = [
        _Step("{x} sorted in ascending order", "sorted({x})", "list"),
        _Step("{x} sorted in descending order", "sorted({x}, reverse=True)", "list"),
        _Step("{x} in reverse order", "{x}[::-1]", "list"),
        *(_Step(f"the list of the elements of {{x}} multiplied by {k}", f"[i * {k} for i in {{x}}]", "list")
          for k in range(2, 11)),
        *(_Step(f"the list of the elements of {{x}} plus {k}", f"[i + {k} for i in {{x}}]", "list")
          for k in range(1, 11)),
        *(_Step(f"the list of the elements of {{x}} greater than {k}", f"[i for i in {{x}} if i > {k}]", "list")
          for k in range(0, 11)),
        _Step("the list of the even elements of {x}", "[i for i in {x} if i % 2 == 0]", "list"),
        _Step("the list of the odd elements of {x}", "[i for i in {x} if i % 2 != 0]", "list"),
        *(_Step(f"the first {k} elements of {{x}}", f"{{x}}[:{k}]", "list") for k in range(2, 5)),
        _Step("the sum of {x}", "sum({x})", "number"),
        _Step("the number of elements of {x}", "len({x})", "number"),
    ]  # fmt: skip
    return {"number": on_numbers, "string": on_strings, "list": on_lists}


class CodeBasics:
    """One function a chain of steps, asked once, in one of several wordings and under one of several names."""

    name = "code-basics"
    label = "code"
    description = CATEGORIES[label]
    max_new_tokens = 64

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split."""
        check_split(split)
        return _examples()[split]

    def is_right(self, example: Example, answer: str) -> bool:
        """The code of the answer must pass the example's tests in the sandbox."""
        return run_tests(code_of(answer), example.tests).passed


def code_of(answer: str) -> str:
    """The first fenced block of an answer, or all of it where there is none."""
    fenced = _FENCE.search(answer)
    return fenced.group(1) if fenced else answer


@cache
def _examples() -> dict[str, list[Example]]:
    by_split: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for kind, chain in _chains():
        by_split[split_of((kind, *(step.expression for step in chain)))].append(_example(kind, chain))
    return {split: sample(made, _EXAMPLES[split]) for split, made in by_split.items()}


def _chains() -> Iterator[tuple[str, tuple[_Step, ...]]]:
    steps = _steps()
    for kind, firsts in steps.items():
        for first in firsts:
            yield kind, (first,)
            for second in steps.get(first.gives, ()):
                yield kind, (first, second)


def _example(kind: str, chain: tuple[_Step, ...]) -> Example:
    argument = _KINDS[kind].argument
    *before, last = chain
    # A second step works on a value with a name of its own: "the square of n minus 5" could be two things.
    value = "value" if before else argument
    lines = [f"value = {step.expression.format(x=argument)}" for step in before]
    lines.append(f"return {last.expression.format(x=value)}")
    wanted = last.words.format(x=f"`{value}`")
    wanted += "".join(f", where `value` is {step.words.format(x=f'`{argument}`')}" for step in before)
    name = pick(_NAMES, ("name", kind, *lines))
    prompt = pick(_WORDINGS, (kind, *lines)).format(
        name=name, argument=argument, given=_KINDS[kind].given, wanted=wanted
    )
    program = "\n    ".join([f"def {name}({argument}):", *lines])
    namespace: dict = {}
    exec(program, namespace)  # our own text, from the tables above
    tests = tuple(f"assert {name}({value!r}) == {namespace[name](value)!r}" for value in _KINDS[kind].values)
    return Example(prompt, program, f"```python\n{program}\n```", tests=tests)
