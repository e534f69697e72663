"""Runs a model's code against tests in a process of its own, contained.

What the code meets: its own session, an empty folder that is removed afterwards, no more processes than itself, limits
on CPU time, memory and file size, output that goes nowhere, and a wall clock that ends it. Where it may write is
enforced by Landlock, and nothing is run where the system has none. The network is cut off where the system lets an
ordinary user do so. `sandbox_child.py` is the other side, inside the process.

This contains mistakes, and the odd things that a model writes. It is no fortress: code that sets out to look right to
the tests, from inside the process that runs them, will find a way. Nothing of the page leads here.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_CHILD = Path(__file__).with_name("sandbox_child.py")
_LARGEST_REPORT = 4096


class SandboxError(RuntimeError):
    """This system cannot contain code, so none is run."""


@dataclass(frozen=True)
class Limits:
    """seconds of CPU and of the wall clock, memory (address space) and the largest file in bytes."""

    cpu_seconds: int = 4
    wall_seconds: float = 6.0
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 2**20


@dataclass(frozen=True)
class Outcome:
    """Whether every test passed, and if not, what ended the program, in a few words."""

    passed: bool
    detail: str = ""


def run_tests(program: str, tests: Sequence[str], limits: Limits | None = None) -> Outcome:
    """Run `program`, then each of `tests` (Python statements that raise where they fail) in its namespace.

    Raises:
        SandboxError: code cannot be contained here.
    """
    limits = limits or Limits()
    # Only who gets to the end says this word: `os._exit(0)` in the middle is no success.
    passed = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="t2-sandbox-", ignore_cleanup_errors=True) as folder:
        request = {"program": program, "tests": list(tests), "folder": folder, "passed": passed} | asdict(limits)
        read_end, write_end = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD), str(write_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"},
                pass_fds=[write_end],
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        with os.fdopen(read_end, "rb") as reports:
            try:
                process.communicate(json.dumps(request).encode(), timeout=limits.wall_seconds)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"took longer than {limits.wall_seconds:g} s")
            finally:
                _kill(process)
            report = reports.read(_LARGEST_REPORT).decode("utf-8", "replace")
    if report.startswith("uncontained: "):
        raise SandboxError(f"code is not run on this system: {report.removeprefix('uncontained: ')}")
    if report == passed:
        return Outcome(True)
    if process.returncode < 0:
        return Outcome(False, f"ended by {signal.Signals(-process.returncode).name}")
    return Outcome(False, report or f"ended with exit code {process.returncode} before its tests were done")


def _kill(process: subprocess.Popen) -> None:
    """End the process and whatever is in its session, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
