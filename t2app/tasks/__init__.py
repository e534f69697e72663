"""What a model is trained and measured on: one file a task, all of them by name in `registry`.

Some tasks run the code of an answer. Nothing that the page needs may lead to those, so the package itself brings none.
"""

from t2app.tasks.task import SPLITS, Example, Task

__all__ = ["SPLITS", "Example", "Task"]
