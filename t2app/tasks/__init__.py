"""The tasks, by name: one file a task."""

from t2app.tasks.arc import Arc
from t2app.tasks.arithmetic import Arithmetic
from t2app.tasks.code import CodeBasics
from t2app.tasks.competition_math import CompetitionMath
from t2app.tasks.dispatch import Dispatch
from t2app.tasks.gsm8k import Gsm8k
from t2app.tasks.humaneval import HumanEval
from t2app.tasks.mbpp import Mbpp
from t2app.tasks.reasoning import ReasoningBasics
from t2app.tasks.svamp import Svamp
from t2app.tasks.task import SPLITS, Example, Task
from t2app.tasks.union import Union

# Those that make their own examples first, then the benchmarks to train on, then those to be tested on only; last the
# first pass itself.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Arithmetic(),
        ReasoningBasics(),
        CodeBasics(),
        Gsm8k(),
        Mbpp(),
        Arc("ARC-Easy"),
        Svamp(),
        CompetitionMath(),
        HumanEval(),
        Arc("ARC-Challenge"),
        Dispatch(),
    )
}

__all__ = ["SPLITS", "TASKS", "Example", "Task", "Union", "task_named"]


def task_named(name: str) -> Task:
    """The task called `name`; raises ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"there is no task '{name}'; there are: {', '.join(TASKS)}")
    return TASKS[name]
