"""The tasks, by name."""

from t2app.tasks.arc import Arc
from t2app.tasks.arithmetic import Arithmetic
from t2app.tasks.code import CodeBasics
from t2app.tasks.competition_math import CompetitionMath
from t2app.tasks.dispatch import Dispatch
from t2app.tasks.gsm8k import Gsm8k
from t2app.tasks.humaneval import HumanEval
from t2app.tasks.mbpp import Mbpp
from t2app.tasks.puzzles import PUZZLES
from t2app.tasks.reasoning import ReasoningBasics
from t2app.tasks.svamp import Svamp
from t2app.tasks.task import Task
from t2app.tasks.visual_questions import VISUAL_QUESTIONS

# Those that make their own examples first, then the benchmarks to train on, those to be tested on only and those to
# search a mixture for; last the first pass itself.
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
        *VISUAL_QUESTIONS,
        *PUZZLES,
        Dispatch(),
    )
}


def task_named(name: str) -> Task:
    """The task called `name`; raises ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"there is no task '{name}'; there are: {', '.join(TASKS)}")
    return TASKS[name]
