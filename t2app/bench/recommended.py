"""What a search keeps, against what it could keep: on validation, the test is not touched."""

from collections.abc import Iterator

from t2app.bench.figure import Figure, figure_of
from t2app.evaluation import BASE, evaluate
from t2app.experts import mix
from t2app.messages import SearchSettings
from t2app.models.model import load_model
from t2app.search import MixtureSearch, by_neighbourhood
from t2app.tasks.registry import task_named
from t2app.tasks.shots import pick_shots

_TASKS = ("letter-counting", "chain-sum")
_SHOTS, _ROUNDS = 10, 3
# Not those of the searches that README's table measures on the test.
_SEEDS = range(10, 16)


def bench_recommended(model_name: str, precision: str) -> Iterator[Figure]:
    """Accuracy on validation, as a share, of what a search could keep, and what trying the best again adds to its time.

    Of the base model and each expert alone, and of the candidates of each search that are the best by their own score,
    by their neighbours' and when tried again. The added seconds are a share of the rounds' seconds.
    """
    model = load_model(model_name, precision, many_rows=True)
    for name in _TASKS:
        task = task_named(name)
        held_out = task.examples("validation")
        alone = {BASE: None} | {expert.name: mix(model.experts, {expert.name: 1.0}) for expert in model.experts}
        columns = {kept: [mixture] * len(held_out) for kept, mixture in alone.items()}
        accuracies = {row.mixture: [row.accuracy] for row in evaluate(model, task, held_out, columns)}
        added = []
        for seed in _SEEDS:
            search = MixtureSearch(
                model, task, pick_shots(task, _SHOTS, seed), SearchSettings(rounds=_ROUNDS, seed=seed)
            )
            *_, last_round, reevaluated = search.run()
            added.append(reevaluated.seconds / last_round.seconds - 1)
            points = {
                "best": max(search.scores, key=search.scores.get),
                "smoothed": by_neighbourhood(search.scores)[0],
                "reevaluated": search.best,
            }
            columns = {
                kept: [mix(model.experts, search.weights(point))] * len(held_out) for kept, point in points.items()
            }
            for row in evaluate(model, task, held_out, columns):
                accuracies.setdefault(row.mixture, []).append(row.accuracy)
        for kept, values in accuracies.items():
            yield figure_of("recommended", f"{name}_{kept}", values, "share")
        yield figure_of("recommended", f"{name}_added_seconds", added, "share")
