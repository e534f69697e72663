"""What a search keeps, against the candidate whose own score is the best: on validation, the test is not touched."""

from collections.abc import Iterator

from t2app.bench.figure import Figure, figure_of
from t2app.evaluation import evaluate
from t2app.experts import mix
from t2app.messages import SearchSettings
from t2app.models import load_model
from t2app.search import MixtureSearch, pick_shots, recommended
from t2app.tasks.registry import task_named

_TASKS = ("letter-counting", "chain-sum")
_SHOTS, _ROUNDS = 10, 3
# Not those of the searches that README's table measures on the test.
_SEEDS = range(10, 16)


def bench_recommended(model_name: str, precision: str) -> Iterator[Figure]:
    """Accuracy on the validation examples of both candidates of each search, as a share."""
    model = load_model(model_name, precision, many_rows=True)
    for name in _TASKS:
        task = task_named(name)
        held_out = task.examples("validation")
        accuracies: dict[str, list[float]] = {}
        for seed in _SEEDS:
            search = MixtureSearch(
                model, task, pick_shots(task, _SHOTS, seed), SearchSettings(rounds=_ROUNDS, seed=seed)
            )
            for _ in search.rounds():
                pass
            points = {"best": max(search.scores, key=search.scores.get), "recommended": recommended(search.scores)}
            mixtures = {
                kept: [mix(model.experts, search.weights(point))] * len(held_out) for kept, point in points.items()
            }
            for row in evaluate(model, task, held_out, mixtures):
                accuracies.setdefault(row.mixture, []).append(row.accuracy)
        for kept, values in accuracies.items():
            yield figure_of("recommended", f"{name}_{kept}", values, "share")
