"""The inside of `sandbox.py`: gives up every right that it can, then runs the program and its tests.

It is started as a script, by path, and uses the standard library alone. Numbers are those of Linux's headers:
landlock.h, sched.h, prctl.h and capability.h; the system calls of Landlock have the same numbers on every architecture.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

_NOBODY = 65534
_KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 8, 38
_CAPABILITY_VERSION = 0x20080522
_MAY_READ = 1 << 2  # CAP_DAC_READ_SEARCH
_NEW_USER_NAMESPACE, _NEW_NETWORK_NAMESPACE = 0x10000000, 0x40000000
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1
# Writing, removing and making of every kind, which the first version of Landlock knows (bits 1 and 4 to 12); moving
# between folders (13) came with the second, truncating (14) with the third.
_WRITING = sum(1 << bit for bit in (1, *range(4, 13)))
_WRITING_SINCE = {2: 1 << 13, 3: 1 << 14}


def main() -> None:
    report = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    request = json.load(sys.stdin)
    try:
        contain(request)
    except OSError as error:
        report.write(f"uncontained: {error.strerror or error}")
        report.close()
        return
    # Nothing that the program can reach by accident leads to the report.
    namespace = {"__name__": "__main__"}
    try:
        exec(compile(request["program"], "program", "exec"), namespace)
        for test in request["tests"]:
            exec(compile(test, "test", "exec"), namespace)
    except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt are failures here too
        report.write(f"{type(error).__name__}: {error}"[:1000])
    else:
        report.write(request["passed"])
    report.flush()
    # Threads, exit handlers and destructors of the program have no say any longer.
    os._exit(0)


def contain(request: dict) -> None:
    """Give up rights for good; raises OSError where writing cannot be confined to the folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0:
        _become_nobody(libc, request["folder"])
    else:
        libc.unshare(_NEW_USER_NAMESPACE | _NEW_NETWORK_NAMESPACE)  # where the system allows it
    _confine_writing(libc, request["folder"])
    for limit, value in (
        (resource.RLIMIT_CPU, request["cpu_seconds"]),
        (resource.RLIMIT_AS, request["memory_bytes"]),
        (resource.RLIMIT_FSIZE, request["file_bytes"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _become_nobody(libc: ctypes.CDLL, folder: str) -> None:
    """Root is above the limit on processes. The right to read stays: its Python may lie where only root may look."""
    libc.unshare(_NEW_NETWORK_NAMESPACE)
    os.chown(folder, _NOBODY, _NOBODY)
    os.setgroups([])
    os.setgid(_NOBODY)
    _checked(libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0))
    os.setuid(_NOBODY)
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _checked(libc.capset(header, struct.pack("6I", _MAY_READ, _MAY_READ, 0, 0, 0, 0)))


def _confine_writing(libc: ctypes.CDLL, folder: str) -> None:
    if platform.system() != "Linux":
        raise OSError(f"{platform.system()} has no Landlock, which confines what it writes; use Linux or a container")
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise OSError("this kernel has no Landlock, which confines what the code writes")
    access = _WRITING | sum(bit for since, bit in _WRITING_SINCE.items() if version >= since)
    handled = struct.pack("Q", access)
    ruleset = _checked(libc.syscall(_LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0))
    beneath = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    _checked(libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", access, beneath), 0))
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    os.close(beneath)
    os.close(ruleset)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


if __name__ == "__main__":
    main()
