"""Accuracy of mixtures on a task's examples: with its interval, and tested against the base model on the same examples.

Rows carry their mixtures, so base, experts and dispatched mixtures are answered in the same batches. Answers can be
kept in a file, from which an evaluation that was cut off goes on.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from t2app.decoding import collected, decode
from t2app.dispatch import Dispatcher
from t2app.experts import digest
from t2app.messages import Sampling
from t2app.models.model import Model
from t2app.models.vision import PictureInputs
from t2app.spectral import Deltas
from t2app.tasks import Example, Task

BASE = "base"
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` greedy answers, and the 95 % Wilson interval [low, high] of the accuracy.

    `p_value` is McNemar's exact test of the hypothesis that the mixture and the base model are right equally often,
    over the examples on which they differ; None for the base model and where it was not measured beside it.
    """

    task: str
    mixture: str
    correct: int
    n: int
    p_value: float | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        # Here and not above, as in `_p_value`: it brings pandas and scipy, and a search on the page needs neither.
        from statsmodels.stats.proportion import proportion_confint

        low, high = proportion_confint(self.correct, self.n, alpha=0.05, method="wilson")
        return float(low), float(high)


@dataclass(frozen=True)
class DispatchAccuracy(Accuracy):
    """How often a dispatch names the category; `confusion` counts what was named, by the right category."""

    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class AnswerFile:
    """Answers that were given, by what they depend on: weights, precision, prompt, length and the mixture's numbers.

    Args:
        path: a file of one JSON object a line, which is read if it is there and grows by every answer.
    """

    def __init__(self, path: Path):
        self._path = path
        self._answers: dict[str, str] = {}
        if path.exists():
            # A line that was being written when the run was cut off is no answer.
            whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
            self._answers = {row["key"]: row["answer"] for row in map(json.loads, filter(None, whole.split("\n")))}
            path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)

    def known(self, keys: Iterable[str]) -> dict[str, str]:
        """The answers that there are to these keys."""
        return {key: self._answers[key] for key in keys if key in self._answers}

    def add(self, answers: Mapping[str, str]) -> None:
        """Keep answers by key; they are on disk when this returns."""
        self._answers |= answers
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items())


def greedy_answers(
    model: Model,
    task: Task,
    examples: Sequence[Example],
    mixtures: Sequence[Deltas | None],
    progress: Callable[[int], None] = lambda done: None,
    kept: AnswerFile | None = None,
) -> list[str]:
    """The model's greedy answer to every example, each under its own mixture, in the order of the examples.

    Args:
        kept: answers that need not be given again, and where new ones are added.
    """
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    digests = _Digests()
    about = f"{model.identity.fingerprint} {model.precision} {task.max_new_tokens}"
    keys = [f"{about} {digests.of(m)} {_asked(e)}" for e, m in zip(examples, mixtures, strict=True)]
    # A dispatched mixture often is an expert's own: what is asked for twice is answered once.
    times, place = Counter(keys), {key: i for i, key in enumerate(keys)}
    answers = {} if kept is None else kept.known(place)
    progress(sum(times[key] for key in answers))
    for prompts, picture in _batches(model, {key: examples[i] for key, i in place.items() if key not in answers}):
        steps = decode(
            model.adapted,
            list(prompts.values()),
            [mixtures[place[key]] for key in prompts],
            sampling,
            model.eos_ids,
            picture=picture,
        )
        rows = zip(prompts, collected(steps), strict=True)
        new = {key: model.tokenizer.decode(row, skip_special_tokens=True) for key, row in rows}
        answers |= new
        if kept is not None:
            kept.add(new)
        progress(sum(times[key] for key in prompts))
    return [answers[key] for key in keys]


def _batches(
    model: Model, questions: Mapping[str, Example]
) -> Iterator[tuple[dict[str, list[int]], PictureInputs | None]]:
    """What is answered together: token ids by key, and the picture that all of them carry."""
    prompts = {key: model.prompt_ids(example.prompt) for key, example in questions.items() if example.picture is None}
    # Prompts of like length share a batch: less padding, and rows that end together.
    order = sorted(prompts, key=lambda key: len(prompts[key]))
    for start in range(0, len(order), _BATCH_ROWS):
        yield {key: prompts[key] for key in order[start : start + _BATCH_ROWS]}, None
    # A picture is seen once for all mixtures that answer about it.
    pictured: dict[str, list[str]] = {}
    for key, example in questions.items():
        if example.picture is not None:
            pictured.setdefault(_asked(example), []).append(key)
    for keys in pictured.values():
        example = questions[keys[0]]
        ids, picture = model.picture_prompt(example.prompt, example.picture.image())
        yield dict.fromkeys(keys, ids), picture


def evaluate(
    model: Model,
    task: Task,
    examples: Sequence[Example],
    mixtures: Mapping[str, Sequence[Deltas | None]],
    progress: Callable[[int], None] = lambda done: None,
    kept: AnswerFile | None = None,
) -> list[Accuracy]:
    """Greedy accuracy of each mixture on `examples`, in the order of `mixtures`.

    Args:
        mixtures: by name, one for every example: a dispatch may decide differently for each. "base" is what the others
            are tested against.

    Raises:
        ValueError: there is no example.
    """
    if not examples:
        raise ValueError(f"there are no examples of '{task.name}' to evaluate on")
    n = len(examples)
    rows = [mixture for column in mixtures.values() for mixture in column]
    answers = greedy_answers(model, task, [*examples] * len(mixtures), rows, progress, kept)
    right = {
        name: [task.is_right(example, answer) for example, answer in zip(examples, answers[k * n :], strict=False)]
        for k, name in enumerate(mixtures)
    }
    base = right.get(BASE)
    return [
        Accuracy(task.name, name, sum(column), n, None if base is None or name == BASE else _p_value(base, column))
        for name, column in right.items()
    ]


def evaluate_dispatch(
    task: str,
    prompts: Sequence[tuple[str, str]],
    dispatcher: Dispatcher,
    progress: Callable[[int], None] = lambda done: None,
) -> DispatchAccuracy:
    """How often `dispatcher` names the category of prompts, which come with the right one.

    Raises:
        ValueError: there is no prompt, or the dispatcher names no categories.
    """
    if not prompts:
        raise ValueError(f"there are no examples of '{task}' to evaluate on")
    confusion: dict[str, Counter[str]] = {}
    for prompt, label in prompts:
        named = dispatcher.decide(prompt).label
        if named is None:
            raise ValueError(f"the dispatch '{dispatcher.name}' names no category, which '{task}' measures")
        confusion.setdefault(label, Counter())[named] += 1
        progress(1)
    right = sum(counts[label] for label, counts in confusion.items())
    counts = {label: dict(confusion[label]) for label in sorted(confusion)}
    return DispatchAccuracy(task, dispatcher.name, right, len(prompts), confusion=counts)


def write_csv(accuracies: Iterable[Accuracy], path: Path) -> None:
    """One line a task and mixture, under a line of names; the file's folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "mixture", "correct", "n", "accuracy", "low", "high", "p_value"))
        for row in accuracies:
            writer.writerow((row.task, row.mixture, row.correct, row.n, row.accuracy, *row.interval, row.p_value))


def results_table(accuracies: Iterable[Accuracy]) -> str:
    """The accuracies as a Markdown table."""
    lines = [
        "| task | mixture | accuracy | 95 % interval | n | p against base |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in accuracies:
        low, high = row.interval
        p_value = "" if row.p_value is None else "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"
        lines.append(
            f"| {row.task} | {row.mixture} | {row.accuracy:.1%} | {low:.1%} to {high:.1%} | {row.n} | {p_value} |"
        )
    return "\n".join(lines) + "\n"


def confusion_table(row: DispatchAccuracy) -> str:
    """What a dispatch named, by the right category, as a Markdown table."""
    named = sorted({label for counts in row.confusion.values() for label in counts})
    lines = [f"| {row.mixture}, right: | named {' | '.join(named)} |", "| --- |" + " --- |" * len(named)]
    for label, counts in row.confusion.items():
        lines.append(f"| {label} | {' | '.join(str(counts.get(name, 0)) for name in named)} |")
    return "\n".join(lines) + "\n"


def _p_value(base: Sequence[bool], mixture: Sequence[bool]) -> float:
    gained = sum(not before and after for before, after in zip(base, mixture, strict=True))
    lost = sum(before and not after for before, after in zip(base, mixture, strict=True))
    if gained + lost == 0:
        return 1.0
    from statsmodels.stats.contingency_tables import mcnemar

    # The test looks at these two alone.
    return float(mcnemar([[0, lost], [gained, 0]], exact=True).pvalue)


class _Digests:
    """SHA-256 of mixtures' numbers, each computed once: most rows share one object."""

    def __init__(self):
        # With the mixture itself, so that its id is not given to another one meanwhile.
        self._by_id: dict[int, tuple[Deltas, str]] = {}

    def of(self, mixture: Deltas | None) -> str:
        if mixture is None:
            return BASE
        if id(mixture) not in self._by_id:
            self._by_id[id(mixture)] = (mixture, digest(mixture))
        return self._by_id[id(mixture)][1]


def _asked(example: Example) -> str:
    """SHA-256 (hex) of what a model is asked: the prompt, and the picture if there is one."""
    text = example.prompt if example.picture is None else f"{example.picture.digest} {example.prompt}"
    return hashlib.sha256(text.encode()).hexdigest()
