"""The tasks, by name: one file a task."""

from t2app.tasks.arithmetic import Arithmetic
from t2app.tasks.code import CodeBasics
from t2app.tasks.reasoning import ReasoningBasics
from t2app.tasks.task import SPLITS, Example, Task

TASKS: dict[str, Task] = {task.name: task for task in (Arithmetic(), ReasoningBasics(), CodeBasics())}

__all__ = ["SPLITS", "TASKS", "Example", "Task", "task_named"]


def task_named(name: str) -> Task:
    """The task called `name`; raises ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"there is no task '{name}'; there are: {', '.join(TASKS)}")
    return TASKS[name]
