"""Several tasks of one category as one, to train an expert on all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from t2app.tasks.task import Example, Task


@dataclass(frozen=True, kw_only=True)
class _TaskExample(Example):
    """An example that remembers whose it is."""

    task: Task


class Union:
    """Every task has an equal share of every split.

    For training, the examples of the smaller tasks come several times; of the other splits only as many are taken as
    the smallest task has.

    Raises:
        ValueError: the tasks are not of one category; an expert stands for one.
    """

    def __init__(self, tasks: Sequence[Task]):
        labels = {task.label for task in tasks}
        if len(labels) != 1:
            raise ValueError(
                f"an expert stands for one category of prompts, and {', '.join(task.name for task in tasks)} are of "
                f"{', '.join(sorted(labels))}; train an expert for each"
            )
        self._tasks = tasks
        self.name = "+".join(task.name for task in tasks)
        self.label = tasks[0].label
        self.description = tasks[0].description
        self.max_new_tokens = max(task.max_new_tokens for task in tasks)

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`."""
        by_task = [
            [_TaskExample(**vars(example), task=task) for example in task.examples(split)] for task in self._tasks
        ]
        count = (max if split == "train" else min)(map(len, by_task))
        return [example for examples in by_task for example in islice(cycle(examples), count)]

    def is_right(self, example: Example, answer: str) -> bool:
        return example.task.is_right(example, answer)
