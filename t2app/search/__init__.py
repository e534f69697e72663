"""Searching the weights of the experts for a new task (paper, section 3.2, few-shot adaptation)."""

from t2app.search.cross_entropy import CrossEntropy
from t2app.search.scores import Score, scorer
from t2app.search.search import MixtureSearch, by_neighbourhood

__all__ = ["CrossEntropy", "MixtureSearch", "Score", "by_neighbourhood", "scorer"]
