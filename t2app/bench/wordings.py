"""How often the prompt-based dispatch is right, by wording and calibration: on prompts to train on, not on the test."""

from collections.abc import Iterator, Sequence

from statsmodels.stats.proportion import proportion_confint

from t2app.bench.figure import Figure
from t2app.categories import LABELS
from t2app.dispatch import PromptDispatch
from t2app.dispatch.wordings import ASKED, CALIBRATIONS, DEFAULT_CALIBRATION, WORDINGS
from t2app.models.model import load_model
from t2app.tasks.dispatch import labelled_prompts

_OF_EACH_LABEL = 60


def bench_wordings(model_name: str, precision: str) -> Iterator[Figure]:
    """The share of prompts that are named rightly, with its 95 % Wilson interval as the range."""
    model = load_model(model_name, precision)
    labelled = labelled_prompts("train")
    prompts = [row for label in LABELS for row in [row for row in labelled if row[1] == label][:_OF_EACH_LABEL]]
    asked = [((wording,), calibration) for wording in WORDINGS for calibration in CALIBRATIONS]
    for wordings, calibration in [*asked, (ASKED, DEFAULT_CALIBRATION)]:
        dispatcher = PromptDispatch(model, wordings=wordings, calibration=calibration)
        yield _share(f"{'+'.join(wordings)}_{calibration}", dispatcher, prompts)


def _share(figure: str, dispatcher: PromptDispatch, prompts: Sequence[tuple[str, str]]) -> Figure:
    right = sum(dispatcher.decide(prompt).label == label for prompt, label in prompts)
    low, high = proportion_confint(right, len(prompts), alpha=0.05, method="wilson")
    return Figure("wordings", figure, right / len(prompts), float(low), float(high), len(prompts), "share")
