"""The sandbox against what a model's code may do by mistake, and what nobody would by mistake."""

import ast
import socket
import time
from pathlib import Path

import pytest

import t2app
from t2app.sandbox import Limits, Outcome, run_tests

SHORT = Limits(cpu_seconds=1, wall_seconds=3.0)


def detail(program: str, limits: Limits = SHORT) -> str:
    """What ended a program that must not pass."""
    outcome = run_tests(program, ["assert True"], limits)
    assert not outcome.passed
    return outcome.detail


def test_code_that_passes_its_tests_passes():
    assert run_tests("def double(x):\n    return 2 * x", ["assert double(2) == 4", "assert double(0) == 0"]).passed


@pytest.mark.parametrize(
    ("program", "tests", "expected"),
    [
        ("def f(x): return x", ["assert f(1) == 2"], "AssertionError"),
        ("def f(x): return x", ["assert f(1) == 1", "f()"], "TypeError"),
        ("def f(x) return x", ["assert True"], "SyntaxError"),
        ("", ["assert f(1) == 1"], "NameError"),
        ("raise SystemExit(0)", ["assert True"], "SystemExit"),
        ("raise KeyboardInterrupt", ["assert True"], "KeyboardInterrupt"),
    ],
)
def test_code_that_fails_says_by_what(program, tests, expected):
    outcome = run_tests(program, tests)
    assert not outcome.passed and outcome.detail.startswith(expected)


def test_ordinary_modules_and_files_of_its_own_work():
    program = "import math, re, collections, json\nopen('note', 'w').write('x')\nassert open('note').read() == 'x'"
    assert run_tests(program, ["assert math.sqrt(4) == 2"]) == Outcome(True)


def test_leaving_early_with_success_is_no_success():
    assert "before its tests were done" in detail("import os\nos._exit(0)")


def test_endless_loop_is_ended_by_its_cpu_time():
    started = time.monotonic()
    assert detail("while True: pass") in ("ended by SIGKILL", "ended by SIGXCPU")
    assert time.monotonic() - started < SHORT.wall_seconds


def test_endless_sleep_is_ended_by_the_clock():
    assert detail("import time\ntime.sleep(1000)") == "took longer than 3 s"


def test_fork_bomb_makes_no_second_process():
    bomb = "import os\nwhile True:\n    os.fork()"
    assert detail(bomb).startswith("BlockingIOError")


def test_processes_and_threads_cannot_be_started():
    for program in (
        "import subprocess\nsubprocess.run(['true'])",
        "import threading\nthreading.Thread(target=print).start()",
    ):
        assert detail(program).split(":")[0] in ("BlockingIOError", "RuntimeError", "PermissionError")


def test_memory_is_limited():
    assert detail("x = bytearray(2 * 10**9)").startswith("MemoryError")


def test_a_gigabyte_of_output_goes_nowhere():
    program = "import sys\nblock = 'x' * 2**20\nfor _ in range(1024):\n    sys.stdout.write(block)"
    assert run_tests(program, ["assert True"]).passed


def test_a_large_file_is_cut_off():
    assert detail("open('big', 'w').write('x' * 2**22)").startswith(("OSError", "ended by SIGXFSZ"))


def test_nothing_outside_its_folder_is_written_or_removed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("here")
    tmp_path.chmod(0o777)
    kept.chmod(0o666)
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'w')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'mine')",
        f"import os\nos.symlink('x', {str(tmp_path / 'link')!r})",
        "open('/tmp/t2-sandbox-test-escape', 'w')",
    ):
        assert detail(program).startswith(("PermissionError", "OSError")), program
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "here"


def test_deleting_its_own_folder_harms_nobody():
    program = "import os, shutil\nshutil.rmtree(os.getcwd(), ignore_errors=True)"
    assert run_tests(program, ["assert True"]).passed
    assert run_tests("", ["assert True"]).passed


def test_its_folder_is_gone_afterwards():
    outcome = run_tests("import os\nopen('left', 'w')\nraise ValueError(os.getcwd())", [])
    folder = Path(outcome.detail.removeprefix("ValueError: "))
    assert folder.name.startswith("t2-sandbox-") and not folder.exists()


def test_network_cannot_be_reached():
    program = "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert detail(program.format(port=server.getsockname()[1])).startswith(("OSError", "ConnectionRefusedError"))


def test_what_it_learns_of_its_surroundings_is_nothing(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    assert run_tests("import os", ["assert 'SECRET' not in os.environ"]).passed


def test_a_message_without_end_is_cut_off():
    assert len(detail("raise ValueError('x' * 10**7)")) <= 1000


@pytest.mark.parametrize("module", ["ui", "engine", "loading"])
def test_nothing_of_the_page_leads_to_the_sandbox(module):
    folder = Path(t2app.__file__).parent
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        file = folder / f"{name.replace('.', '/')}.py"
        file = file if file.exists() else folder / name.replace(".", "/") / "__init__.py"
        if name in seen or not file.exists():
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("t2app"):
                inner = node.module.removeprefix("t2app").removeprefix(".")
                waiting += [inner] if inner else [alias.name for alias in node.names]
    assert {"messages", module} <= seen and "sandbox" not in seen
