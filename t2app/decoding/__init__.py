"""Batched decoding in which every row has its own prompt, mixture and random generator, and scoring of given answers.

One forward pass a token serves all rows: the answers that are being written for the page, the samples of a training
step, the problems of an evaluation. These files know token ids and mixtures; text appears only where `TextStream` turns
one row's tokens into pieces that can be shown.
"""

from t2app.decoding.batch import Batch, collected, decode, decode_prefilled
from t2app.decoding.likelihood import (
    answer_log_probabilities,
    choice_log_probabilities,
    log_probabilities_after,
    parts_by_length,
)
from t2app.decoding.prefill import Prefilled, prefill
from t2app.decoding.prefix import Beginnings, Prefix, compute_prefix, run_in_parts
from t2app.decoding.text_stream import TextStream

__all__ = [
    "Batch",
    "Beginnings",
    "Prefilled",
    "Prefix",
    "TextStream",
    "answer_log_probabilities",
    "choice_log_probabilities",
    "collected",
    "compute_prefix",
    "decode",
    "decode_prefilled",
    "log_probabilities_after",
    "parts_by_length",
    "prefill",
    "run_in_parts",
]
