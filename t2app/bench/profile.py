"""Where the time of a decoding step goes, and how near it comes to what the machine allows.

No step is faster than the memory gives its weights: that is the floor of a step for one user. A step for many is soon
bound by the processor, which multiplies every row by them; there the floor is the time that torch's product of large
matrices takes for as many operations. Both are measured beside the steps, since a virtual machine's part of memory and
processor changes.

Where the time goes is told by torch's profiler, by the module that an operation runs in. The profiler makes a step
slower, but hardly an operation; so the operations' times are held against a step without it, and what they leave is the
rest: Python, and what PyTorch does around its operations.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.autograd.profiler import profile, record_function

from t2app.bench.arithmetic import Multiplication
from t2app.bench.figure import Figure, figure_of
from t2app.bench.memory import MemoryReading
from t2app.bench.step import even_mixture, step_seconds, stepper, weight_bytes, weight_operations, with_matrices
from t2app.models.model import Model, load_model
from t2app.spectral import SpectralLinear

# What an operation is for, by the module that it runs in: the blocks' linear layers with their edits, all else of
# attention (positions, keys and values among it), the output layer, and everything else in the model (norms,
# activations, sums, the embedding). What runs outside of it chooses the token.
_LINEAR, _ATTENTION, _HEAD, _ELEMENTWISE, _CHOICE = "linear", "attention", "head", "elementwise", "choice"
_KINDS = (_LINEAR, _ATTENTION, _HEAD, _ELEMENTWISE, _CHOICE)
# The kernels of whole blocks and of a whole step, and what they call their parts, which are in no module.
_BLOCKS, _STEP = "t2app::decode", "t2app::step"
_KINDS_OF_PARTS = {
    "t2app::linear": _LINEAR,
    "t2app::attention": _ATTENTION,
    "t2app::head": _HEAD,
    "t2app::likeliest": _CHOICE,
}

_USERS = 8
_PLAIN_EIGHT = "as many rows, none of them adapted"


def bench_profile(model_name: str, precision: str, steps: int = 30) -> Iterator[Figure]:
    """What memory and processor give, a step's floors by that, and a step's time by what it is spent on.

    Steps are of the base model alone, of both answers, and of eight users' both answers, each by a mixture of its own.
    `…_bandwidth_share` is the memory's floor over the step: at 1 a step does nothing but read its weights at full
    speed. `…_arithmetic_share` is the same of the processor's floor; the bytes of an edit count as its other numbers
    do. The other shares are of the time of the step before, which is not profiled. Of the blocks' linear layers,
    `products` is what they take in a step that adapts no row, and `edits` what they take more in one of both answers.

    Args:
        steps: how many of each are measured.

    Raises:
        ValueError: the model has no expert to measure with, or is on a GPU, which runs apart from what this sees.
    """
    model = load_model(model_name, precision)
    if model.adapted.model.device.type != "cpu":
        raise ValueError("the bench 'profile' sees a CPU's time only; a GPU's steps are measured by 'decode'")
    mixtures = {
        "base": [None],
        "both": [None, with_matrices(model, even_mixture(model))],
        _PLAIN_EIGHT: [None] * 2 * _USERS,
        "eight": [row for user in range(1, 1 + _USERS) for row in (None, even_mixture(model, user / _USERS))],
    }
    read = {name: weight_bytes(model, rows) for name, rows in mixtures.items()}
    for name, bytes_ in (
        ("blocks", read["base"].blocks),
        ("head", read["base"].head),
        ("matrices", read["both"].edits),
        ("bases", read["eight"].edits),
    ):
        yield figure_of("profile", f"{name}_read", [bytes_ / 1e6], "MB")
    streams = {name: stepper(model, rows, 3 * steps) for name, rows in mixtures.items()}
    memory, arithmetic = MemoryReading(model.adapted.model.device), Multiplication()
    reading: list[float] = []
    multiplying: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in streams}
    by_kind: dict[str, list[dict[str, float]]] = {name: [] for name in streams}
    for _ in range(steps):
        reading.append(memory.seconds_per_byte())
        multiplying.append(arithmetic.seconds_per_operation())
        for name, step in streams.items():
            times[name].append(step_seconds(step))
            by_kind[name].append(times_by_kind(model, step))
    yield figure_of("profile", "read_bandwidth", [1e-9 / value for value in reading], "GB/s")
    yield figure_of("profile", "multiplied", [1e-9 / value for value in multiplying], "GFLOP/s")
    for name, plain in (("base", "base"), ("both", "base"), ("eight", _PLAIN_EIGHT)):
        floors = [value * read[name].total for value in reading]
        operations = weight_operations(model, mixtures[name])
        arithmetic_floors = [value * operations for value in multiplying]
        yield figure_of("profile", f"{name}_floor", [1e3 * floor for floor in floors], "ms")
        yield figure_of("profile", f"{name}_arithmetic_floor", [1e3 * floor for floor in arithmetic_floors], "ms")
        yield figure_of("profile", f"{name}_step", [1e3 * time for time in times[name]], "ms")
        products = [kinds[_LINEAR] for kinds in by_kind[plain]]
        spent = {"bandwidth": floors, "arithmetic": arithmetic_floors, "products": products}
        if name != plain:
            linear = [kinds[_LINEAR] for kinds in by_kind[name]]
            spent["edits"] = [both - base for both, base in zip(linear, products, strict=True)]
        for kind in _KINDS[1:]:
            spent[kind] = [kinds[kind] for kinds in by_kind[name]]
        spent["rest"] = [time - sum(kinds.values()) for time, kinds in zip(times[name], by_kind[name], strict=True)]
        for kind, values in spent.items():
            shares = [value / time for value, time in zip(values, times[name], strict=True)]
            yield figure_of("profile", f"{name}_{kind}_share", shares, "ratio")


def times_by_kind(model: Model, step: Callable[[], object]) -> dict[str, float]:
    """Seconds of the operations of one step by their kind; what runs between two operations is of none."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or every step would print two lines on standard error
    with _marked(model.adapted.model), profile(use_kineto=False) as profiled:
        step()
    times = dict.fromkeys(_KINDS, 0.0)
    for event in profiled.function_events:
        if event.name in _KINDS or event.name.startswith("profiler::"):
            continue
        seconds = 1e-6 * event.time_range.elapsed_us()
        around = _CHOICE if event.cpu_parent is None else event.cpu_parent.name
        if event.name == _STEP:
            times[_ELEMENTWISE] += seconds
        elif around in (_BLOCKS, _STEP) and event.name in _KINDS_OF_PARTS:
            times[_KINDS_OF_PARTS[event.name]] += seconds
            times[_ELEMENTWISE] -= seconds
        # An operation that another one calls is in that one's time.
        elif around in times:
            times[around] += seconds
    return times


@contextmanager
def _marked(transformer: nn.Module) -> Iterator[None]:
    """For the time of a block, every module that says what its operations are for marks them in a profile."""
    head = transformer.get_output_embeddings()
    handles, marks = [], []

    def enter(kind: str, *_: object) -> None:
        marks.append(record_function(kind).__enter__())

    def leave(*_: object) -> None:
        marks.pop().__exit__(None, None, None)

    for path, module in transformer.named_modules():
        kind = _HEAD if module is head else _kind(path, module)
        if kind is not None:
            handles += [module.register_forward_pre_hook(partial(enter, kind)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kind(path: str, module: nn.Module) -> str | None:
    """What the operations of a module are for that are in none of its parts; None: the same as around it."""
    if isinstance(module, (SpectralLinear, nn.Linear)):
        return _LINEAR
    if path == "":
        return _ELEMENTWISE
    return _ATTENTION if "Attention" in type(module).__name__ else None
