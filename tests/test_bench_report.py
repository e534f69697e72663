"""What `bench --out` writes: the figures as they were measured, with the machine and without whose it is."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from t2app.bench import BENCHES, bench_named
from t2app.bench.figure import Figure
from t2app.bench.report import machine, report, without_folders
from t2app.cli import main


def test_file_holds_the_figures_of_the_run_and_no_others(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    file, model = tmp_path / "new" / "BENCH.md", ("--model", str(tiny_folder))
    for precision in ("fp32", "bf16"):
        main(["bench", "first-token", *model, "--precision", precision, "--json", "--out", str(file)])
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        written = [[cell.strip() for cell in line.split("|")[1:-1]] for line in file.read_text().splitlines()]
        rows = [row for row in written if len(row) == 7][2:]
        numbers = ("value", "min", "max")
        assert rows == [
            [row["bench"], row["figure"], *(f"{row[key]:.4g}" for key in numbers), str(row["n"]), row["unit"]]
            for row in printed
        ]
        assert {row["bench"] for row in printed} == {"first-token"}
    text = file.read_text()
    command = f"bench first-token --model {tiny_folder.name} --precision bf16 --json --out {file.name}"
    assert f"python -m t2app {command}" in text
    assert str(tmp_path) not in text and str(tiny_folder.parent) not in text


def test_machine_is_told_but_not_whose_it_is():
    text = report([Figure("basis", "error", 1.0, 0.5, 2.0, 3, "max |VᵀV − I|")], ["basis"], "a-model", "fp32")
    assert f"torch {version('torch')}" in text and date.today().isoformat() in text
    assert "- model: a-model, held in fp32\n" in text
    assert "| basis | error | 1 | 0.5 | 2 | 3 | max \\|VᵀV − I\\| |" in text
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text) and str(Path.home()) not in text


def test_machine_without_one_of_the_packages_is_told_too(monkeypatch):
    monkeypatch.setattr("t2app.bench.report._PACKAGES", ("torch", "no-such-package"))
    assert machine()["packages"] == f"torch {version('torch')}"


def test_machine_that_is_told_to_do_without_some_of_its_instructions_says_so(monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert "limited by" not in machine()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert machine()["limited by"] == "ATEN_CPU_CAPABILITY=avx2"


def test_machine_on_which_nothing_compiles_the_kernels_says_so(tmp_path):
    # In a process of its own: this one may have loaded them.
    script = "from t2app.bench.report import machine; print(machine().get('kernels'))"
    environment = os.environ | {"CXX": "no-such-compiler", "T2_CACHE_DIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ended.stdout == "none, since nothing here compiles them\n", ended.stderr


def test_every_bench_says_in_one_line_what_it_measures():
    lines = [bench_named(name).__doc__.splitlines()[0] for name in BENCHES]
    assert all(line.endswith(".") for line in lines) and len(set(lines)) == len(BENCHES)


def test_paths_of_this_machine_are_left_out_of_a_command():
    words = ["bench", "--out=/data/BENCH.md", "--model", "/models/tiny", "--precision", "bf16", "assets/BENCH.md"]
    expected = ["bench", "--out=BENCH.md", "--model", "tiny", "--precision", "bf16", "assets/BENCH.md"]
    assert without_folders(words) == expected
