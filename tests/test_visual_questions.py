"""Questions about pictures as tasks: their data, what counts as right, and their evaluation on a small random model."""

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from t2app.cli import main
from t2app.evaluation import AnswerFile, greedy_answers
from t2app.models.model import load_model
from t2app.pictures import PictureError
from t2app.tasks import Example
from t2app.tasks.benchmark_data import DataError, pictured_rows
from t2app.tasks.registry import TASKS

COLOURS = ("red", "green", "blue")
SPLITS = {"textvqa": "textvqa/default/validation.jsonl", "okvqa": "ok-vqa/default/val2014.jsonl"}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Both data sets with a question about each of three pictures; two of ten people were wrong."""
    for name in SPLITS.values():
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        with open(file, "w", encoding="utf-8") as lines:
            for number, colour in enumerate(COLOURS):
                Image.new("RGB", (40 + 20 * number, 48), colour).save(file.parent / f"{colour}.png")
                answers = [colour] * 8 + ["grey", "black"]
                row = {"question": "what colour is this?", "answers": answers, "image": f"{colour}.png"}
                lines.write(json.dumps(row) + "\n")
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", SPLITS)
def test_example_holds_its_question_what_people_said_and_its_picture(data, name):
    examples = TASKS[name].examples("test")
    assert [example.answer for example in examples] == list(COLOURS)
    assert examples[0].prompt == "what colour is this?\nAnswer with one word or a short phrase."
    assert [example.picture.image().size for example in examples] == [(40, 48), (60, 48), (80, 48)]
    assert len({example.picture.digest for example in examples}) == 3
    with pytest.raises(ValueError, match=f"'{name}' has no split 'train'"):
        TASKS[name].examples("train")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("two dogs", True),
        ("Two dogs.", True),
        ("2 Dogs", True),
        ("The two dogs!", True),
        ("dont know", False),  # said by two
        ("1,000", True),
        ("1000.", True),
        ("it's 3.5", True),
        ("its 35", False),
        ("two dogs and a cat", False),
        ("", False),
    ],
)
def test_answer_is_right_if_three_people_gave_it_however_they_wrote_it(answer, right):
    said = ("2 dogs", "two dogs", "Two dogs", "don't know", "dont know", "1000", "1,000", "1000", *["Its 3.5"] * 3)
    assert TASKS["textvqa"].is_right(Example("", "", "", answers=said), answer) is right


def test_picture_that_is_not_there_is_named_and_only_when_it_is_needed(data):
    file = data / "textvqa" / "default" / "red.png"
    file.unlink()
    first, *_ = TASKS["textvqa"].examples("test")
    with pytest.raises(DataError, match=f"the picture {file}, which the data names, cannot be read"):
        first.picture.image()


def test_pictures_of_the_hub_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.delenv("T2_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    drawn = io.BytesIO()
    Image.new("RGB", (8, 4), "red").save(drawn, "PNG")
    columns = {"question": ["what?"], "image": [{"bytes": drawn.getvalue(), "path": None}]}
    features = datasets.Features({"question": datasets.Value("string"), "image": datasets.Image()})
    made = datasets.Dataset.from_dict(columns, features=features)
    made.to_parquet(tmp_path / "made" / "data" / "validation-0.parquet")
    [(row, picture)] = pictured_rows(str(tmp_path / "made"), "default", "validation")
    assert row == {"question": "what?"} and picture.image().size == (8, 4)


def test_evaluation_shows_the_model_each_picture(data, vision_folder, capsys):
    main(["eval", "textvqa", "okvqa", "--model", str(vision_folder("qwen2_vl")), "--limit", "2", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["mixture"], row["n"]) for row in rows] == [("textvqa", "base", 2), ("okvqa", "base", 2)]


def test_answers_differ_by_picture_and_mixture_and_are_kept_by_both(data, vision_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    model = load_model(str(vision_folder("qwen2_vl")), "fp32", layers=lambda path: True)
    mixture = {path: torch.full((layer.rank,), 0.5) for path, layer in model.adapted.layers.items()}
    task, examples = TASKS["textvqa"], TASKS["textvqa"].examples("test")
    kept = AnswerFile(tmp_path / "answers.jsonl")
    rows, mixtures = [*examples, *examples], [None] * 3 + [mixture] * 3
    answers = greedy_answers(model, task, rows, mixtures, kept=kept)
    assert len(set(answers)) == 6
    # In another order, and with nothing to decode.
    monkeypatch.setattr("t2app.evaluation.decode", None)
    assert greedy_answers(model, task, rows[::-1], mixtures[::-1], kept=kept) == answers[::-1]


def test_model_that_takes_no_pictures_cannot_be_measured_on_them(data, tiny):
    examples = TASKS["textvqa"].examples("test")
    with pytest.raises(PictureError, match="tiny takes no pictures"):
        greedy_answers(tiny, TASKS["textvqa"], examples, [None] * 3)
