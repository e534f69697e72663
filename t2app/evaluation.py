"""Accuracy of a mixture on a task's examples, with its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from statsmodels.stats.proportion import proportion_confint

from t2app.decoding import collected, decode
from t2app.messages import Sampling
from t2app.models import Model
from t2app.spectral import Deltas
from t2app.tasks import Example, Task

_BATCH_ROWS = 64


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` greedy answers, and the 95 % Wilson interval [low, high] of the accuracy."""

    task: str
    mixture: str
    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        low, high = proportion_confint(self.correct, self.n, alpha=0.05, method="wilson")
        return float(low), float(high)


def greedy_answers(
    model: Model,
    task: Task,
    examples: Sequence[Example],
    mixtures: Sequence[Deltas | None],
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The model's greedy answer to every example, each under its own mixture, in the order of the examples."""
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    prompts = [model.prompt_ids(example.prompt) for example in examples]
    # Prompts of like length share a batch: less padding, and rows that end together.
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))
    answers = [""] * len(examples)
    for start in range(0, len(order), _BATCH_ROWS):
        batch = order[start : start + _BATCH_ROWS]
        steps = decode(
            model.adapted, [prompts[i] for i in batch], [mixtures[i] for i in batch], sampling, model.eos_ids
        )
        for i, row in zip(batch, collected(steps), strict=True):
            answers[i] = model.tokenizer.decode(row, skip_special_tokens=True)
        progress(len(batch))
    return answers


def evaluate(
    model: Model,
    task: Task,
    examples: Sequence[Example],
    mixture_name: str,
    mixtures: Sequence[Deltas | None],
    progress: Callable[[int], None] = lambda done: None,
) -> Accuracy:
    """Greedy accuracy on `examples`, example i under mixtures[i].

    Raises:
        ValueError: there is no example.
    """
    if not examples:
        raise ValueError(f"there are no examples of '{task.name}' to evaluate on")
    answers = greedy_answers(model, task, examples, mixtures, progress)
    correct = sum(task.is_right(example, answer) for example, answer in zip(examples, answers, strict=True))
    return Accuracy(task.name, mixture_name, correct, len(examples))
