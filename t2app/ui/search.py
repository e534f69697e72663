"""The tab that searches a mixture for a new task: solved examples in, rounds to watch, a kept mixture out."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from t2app.figures import search_trace
from t2app.found_mixtures import MixtureError, check_name, mixture_file, write_mixture
from t2app.loading import EngineLoader
from t2app.messages import EXACT, LIKELIHOOD, SCORES, Reevaluated, Searched, SearchSettings, Waiting, few_shot
from t2app.tasks.arithmetic import Arithmetic
from t2app.tasks.puzzles import PUZZLES, has_reasoning_gym
from t2app.tasks.reasoning import ReasoningBasics
from t2app.tasks.shots import Shots, pick_shots
from t2app.tasks.task import Task
from t2app.ui.answer import dispatch_choices
from t2app.ui.updates import Stops, failure, run_buttons

if TYPE_CHECKING:
    from t2app.engine import Engine

_SHOTS = 10
_MOST_SHOTS = 50
_SCORE_TITLES = {
    EXACT: "Exact: answers are decoded and checked, as in the paper",
    LIKELIHOOD: "Likelihood of the expected answers: quicker, nothing is decoded",
}


def build_search_tab(loader: EngineLoader, dispatch: gr.Radio) -> None:
    """Lay the tab out and wire it, within the Blocks that are open; what is found becomes a choice of `dispatch`."""
    gr.Markdown(
        "A few solved examples of a new task are enough to find the mixture of experts that does it best. Mixtures are "
        "tried on all of them, the best ones say where to try next. The search is paid once: what it finds is kept by "
        "name, and every later prompt can use it at no cost."
    )
    tasks = _tasks()
    with gr.Row():
        task = gr.Dropdown(list(tasks), value=next(iter(tasks)), label="Examples of a task", min_width=160)
        fill = gr.Button("Fill in", min_width=100, elem_id="fill")
    shots = gr.Dataframe(
        headers=["prompt", "answer"],
        value=[["", ""]],
        type="array",
        # In place of `column_limits`, which Gradio (6.31) does not heed yet.
        column_count=(2, "fixed"),
        column_widths=["75%", "25%"],
        wrap=True,
        interactive=True,
        label="Solved examples: a prompt and the answer that is expected (⋮ in a cell adds a row)",
        elem_id="shots",
    )
    with gr.Row():
        name = gr.Textbox("mine", label="Keep the mixture as", min_width=160, elem_id="name")
        rounds = gr.Slider(1, SearchSettings.rounds, value=8, step=1, label="Rounds at most")
        seed = gr.Number(0, precision=0, label="Seed", min_width=100)
    score = gr.Radio([(_SCORE_TITLES[score], score) for score in SCORES], value=SearchSettings.score, label="Score")
    per_layer = gr.Checkbox(False, label="A weight for each expert and block, not for each expert")
    with gr.Row():
        search = gr.Button("Search", variant="primary", min_width=120, elem_id="search")
        stop = gr.Button(
            "Stop after this round", variant="stop", interactive=False, min_width=120, elem_id="search-stop"
        )
    status = gr.Markdown("", elem_id="search-status")
    trace = gr.Plot(search_trace(()), label="The search", elem_id="trace")

    stops = Stops()
    # Who kept each of the mixtures that were found since the app was started.
    kept: dict[Path, str] = {}

    # Handlers that ask who calls cannot be `partial`s.
    def run(rows, name, rounds, seed, score, per_layer, request: gr.Request) -> Iterator[list]:
        session = request.session_hash
        with stops.of(session) as stopped:
            yield from _search(loader, kept, session, stopped, rows, name, rounds, seed, score, per_layer)

    def stop_after_this_round(request: gr.Request) -> tuple[dict, str]:
        stops.stop(request.session_hash)
        return gr.update(interactive=False), "Stopping after this round…"

    fill.click(partial(_examples, tasks), inputs=task, outputs=[shots, status], api_visibility="private")
    gr.on(
        [search.click, name.submit],
        run,
        inputs=[shots, name, rounds, seed, score, per_layer],
        outputs=[search, stop, status, trace, dispatch],
        api_name="search",
        show_progress="hidden",
        trigger_mode="once",
        concurrency_limit=1,
    )
    stop.click(stop_after_this_round, outputs=[stop, status], queue=False, api_visibility="private")


def _tasks() -> dict[str, Task]:
    """Those that make their own examples here and whose answers are checked without running them, by name."""
    made_here = (*(PUZZLES if has_reasoning_gym() else ()), Arithmetic(), ReasoningBasics())
    return {task.name: task for task in made_here}


def _examples(tasks: Mapping[str, Task], task: str) -> tuple[list[list[str]], str]:
    """Solved examples of a task to train on."""
    shots = pick_shots(tasks[task], _SHOTS, seed=0)
    return [
        [shot.prompt, shot.solution] for shot in shots
    ], f"{len(shots)} examples of {task}. Change them as you like."


def _search(
    loader: EngineLoader,
    kept: dict[Path, str],
    session: str,
    stopped: threading.Event,
    rows: Sequence[Sequence[str]],
    name: str,
    rounds: int,
    seed: int,
    score: str,
    per_layer: bool,
) -> Iterator[list]:
    """Update the tab with every round; whatever goes wrong ends as a sentence in the status line.

    Args:
        kept: who kept each mixture; this one's name is added.
        stopped: ends the search after its round once it is set.
    """
    try:
        check_name(name)
        settings = SearchSettings(rounds=int(rounds), per_layer=per_layer, score=score, seed=int(seed or 0))
        pairs = [(str(prompt or ""), str(answer or "")) for prompt, answer in rows]
        pairs = [pair for pair in pairs if any(text.strip() for text in pair)]
        if len(pairs) > _MOST_SHOTS:
            raise ValueError(f"There are {len(pairs)} examples; this page takes at most {_MOST_SHOTS}.")
        yield _update(running=True, status="Trying the first mixtures…")
        yield from _rounds(loader.engine(), kept, session, stopped, pairs, name, settings)
    except Exception as error:  # noqa: BLE001  whatever it was, the person who asked must see it
        yield _update(running=False, status=failure(error, "a search"))


def _rounds(
    engine: "Engine",
    kept: dict[Path, str],
    session: str,
    stopped: threading.Event,
    pairs: Sequence[tuple[str, str]],
    name: str,
    settings: SearchSettings,
) -> Iterator[list]:
    """The rounds as they end; then what was found is kept and chosen."""
    from t2app.search import MixtureSearch

    file = mixture_file(engine.model.name, name)
    _check_free(kept, file, session)
    task = Shots(name, pairs)
    search = MixtureSearch(engine.model, task, task.examples("train"), settings)
    seen: list[Searched] = []
    told = ""
    for event in engine.search(search, session):
        if isinstance(event, Waiting):
            yield _update()
            continue
        if isinstance(event, Searched):
            seen.append(event)
            told = _describe(event, len(pairs))
            if stopped.is_set():
                search.stop()
            last = stopped.is_set() or event.round == settings.rounds
            soon = "\n\nTrying the best again…" if last and settings.score == EXACT else ""
        else:
            told += f"\n\n{_describe_reevaluation(event)}"
            soon = ""
        yield _update(status=told + soon, trace=search_trace(seen))
    write_mixture(search.found(name), file)
    kept[file] = session
    chosen = gr.update(choices=dispatch_choices(engine.model.name), value=few_shot(name))
    told += f"\n\nKept as **{name}**: the next answers are mixed by it."
    yield _update(running=False, status=told, dispatch=chosen)


def _check_free(kept: Mapping[Path, str], file: Path, session: str) -> None:
    """Raises MixtureError where a mixture is there that somebody else found, or the same person earlier."""
    if file.exists() and kept.get(file) != session:
        raise MixtureError(f"There is a mixture '{file.stem}' already; keep yours by another name.")


def _describe(event: Searched, shots: int) -> str:
    right = "" if event.right is None else f"{event.right} of {shots} right · "
    return (
        f"Round {event.round} · best mixture: **{_weights(event.best)}** · {right}{event.log_likelihood:.2f} nats a "
        f"token · {event.evaluations} mixtures tried · {event.seconds:.0f} s"
    )


def _describe_reevaluation(event: Reevaluated) -> str:
    alone = ", ".join(f"{name} {right}" for name, right in event.alone.items())
    return (
        f"The best {event.finalists} tried again · kept: **{_weights(event.best)}** · {event.right} of {event.answers} "
        f"answers right · alone: {alone} · {event.seconds:.0f} s"
    )


def _weights(alphas: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {alpha:.2f}" for name, alpha in alphas.items())


def _update(running: bool | None = None, **values) -> list:
    return [*run_buttons(running), *(values.get(name, gr.skip()) for name in ("status", "trace", "dispatch"))]
