"""What the app is started with."""

import subprocess
import sys
from pathlib import Path

import pytest

from t2app.bench.served_app import served_app

APP = Path(__file__).parent.parent / "app.py"


def refusal(monkeypatch, options: str, *arguments: str) -> str:
    """What the app ends with where its variable holds these options and it is given these arguments."""
    monkeypatch.setenv("T2_APP_OPTIONS", options)
    ended = subprocess.run([sys.executable, APP, *arguments], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    return ended.stderr.splitlines()[-1]


def test_options_of_the_variable_come_before_those_of_the_command_line(monkeypatch):
    assert "rows is 0" in refusal(monkeypatch, "--rows 0")
    assert "rows is 1" in refusal(monkeypatch, "--rows 0", "--rows", "1")


def test_options_that_cannot_be_read_are_refused_with_the_reason(monkeypatch):
    assert "No closing quotation" in refusal(monkeypatch, '--model "no-such')
    assert "unrecognized arguments: --no-such" in refusal(monkeypatch, "--no-such")


def test_app_is_served_with_what_the_variable_holds():
    options = {"T2_APP_OPTIONS": "--model 'no such/model'", "HF_HUB_OFFLINE": "1"}
    with pytest.raises(RuntimeError, match="no such/model"), served_app(environment=options) as app:
        app.answer("Hello")
