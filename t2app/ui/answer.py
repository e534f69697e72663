"""The tab that answers a prompt: layout first, top to bottom as a person sees it, then the wiring.

Which dispatch decides is the choice in the settings, and nowhere else: moving a slider chooses `manual`, the button
under the sliders gives the choice back. Once a slider is let go of, the prompt is answered again, and an example is
answered once it is chosen.
"""

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from t2app.categories import CLASSIFIER
from t2app.figures import change_map, mixture_bars, probability_bars, search_trace
from t2app.found_mixtures import kept_mixtures
from t2app.loading import EngineLoader
from t2app.messages import (
    DEFAULT_DISPATCH,
    DISPATCHERS,
    MANUAL,
    PROMPT,
    PROMPT_SOFT,
    Dispatched,
    Event,
    Finished,
    Sampling,
    Waiting,
    few_shot,
)
from t2app.models.catalogue import CATALOGUE, expert_files
from t2app.pictures import read_picture
from t2app.ui import answering
from t2app.ui.updates import LOAD_POLL_SECONDS, Stops, failure, run_buttons

# By what their buttons say.
EXAMPLES = {
    "19 minus 13": "What is 19 minus 13? Answer with just the number.",
    "Who is the shortest?": "Kate is taller than Ben. Ben is taller than Iris. Who is the shortest? Reply with only "
    "the name.",
    "The odd one out": "Find the odd one out among apple, hammer, pear, plum. Give only the word.",
    "A Python function": "Write a Python function `f(numbers)` that takes a list of whole numbers and returns the list "
    "of the even elements of `numbers`.",
    "A poem": "Write a short poem about the sea.",
}
MAX_PROMPT_CHARACTERS = 20_000
# An update of the page takes as long as a token: with one for each, answers took 2.5 times as long (`bench page`).
_UPDATE_SECONDS = 0.1
# Each holds one of the 40 threads that Gradio has for all that the page does, whether it is answered or waits.
_ANSWERS_AT_A_TIME = 32
_DISPATCH_TITLES = {
    CLASSIFIER: "Classifier: an expert trained for it names the category",
    PROMPT: "Prompt: the base model names the category",
    PROMPT_SOFT: "Prompt, soft: the base model's probabilities are the weights",
    MANUAL: "By hand: the sliders decide",
}


class _Stopped(Exception):
    """Somebody stopped the answer."""


@dataclass(frozen=True)
class AnswerTab:
    """What the rest of the page needs of this tab.

    Attributes:
        picture_place: where a picture goes, for a model that takes one.
        sliders: one for every expert that any model to choose has, by the expert's name; the model's own are visible.
        answers: what shows the last answer and what is known of it.
    """

    picture_place: gr.Column
    status: gr.Markdown
    facts: gr.Markdown
    dispatch: gr.Radio
    bars: gr.Plot
    sliders: dict[str, gr.Slider]
    answers: tuple[gr.components.Component, ...]

    @property
    def of_model(self) -> list[gr.components.Component]:
        """What depends on the model; `show_model` updates it."""
        return [self.dispatch, self.bars, *self.sliders.values()]

    def show_model(self, model_name: str, pool: str) -> list:
        """Updates of `of_model` that show another model's mixtures, and the experts of `pool` that it takes."""
        experts = _experts(pool)
        return [
            gr.update(choices=dispatch_choices(model_name), value=DEFAULT_DISPATCH),
            mixture_bars(dict.fromkeys(experts, 0.0)),
            *(gr.update(value=0, visible=name in experts) for name in self.sliders),
        ]


def build_answer_tab(loader: EngineLoader) -> AnswerTab:
    """Lay the tab out and wire it, within the Blocks that are open."""
    pools = [loader.pool_of(model) for model in (loader.model_name, *CATALOGUE)]
    experts, all_experts = _experts(pools[0]), dict.fromkeys(name for pool in pools for name in _experts(pool))
    prompt = gr.Textbox(label="Prompt", lines=2, max_lines=12, placeholder="Ask something…", autofocus=True)
    # Shown once the model is there and takes one.
    with gr.Column(visible=False) as picture_place:
        picture = gr.Image(
            label="Picture (the first pass sees the text only)",
            type="filepath",
            sources=["upload", "clipboard"],
            height=260,
            elem_id="picture",
        )
    # Gradio would read the file itself, and end in a bare "Error" where it holds no picture. An update of the component
    # would undo this, so that what is shown and hidden is its place.
    picture.preprocess = lambda data: None if data is None else data.path
    examples = gr.Examples([*EXAMPLES.values()], inputs=prompt, label="Examples", example_labels=[*EXAMPLES])
    with gr.Row():
        answer = gr.Button("Answer", variant="primary", min_width=120, elem_id="answer")
        stop = gr.Button("Stop", variant="stop", interactive=False, min_width=120, elem_id="stop")
    status = gr.Markdown("Starting…", elem_id="status")
    with gr.Row(equal_height=True):
        with gr.Column(min_width=300):
            bars = gr.Plot(mixture_bars(dict.fromkeys(experts, 0.0)), label="Mixing weights", elem_id="bars")
        with gr.Column(min_width=300):
            # One of the two is shown: what this dispatch decided by.
            reasons = gr.Plot(probability_bars({}), label="Why: what the first pass saw", elem_id="reasons")
    with gr.Row(equal_height=True):
        with gr.Column(min_width=300):
            gr.Markdown("### Adapted")
            adapted = gr.Markdown(elem_id="adapted", buttons=["copy"], line_breaks=True)
            adapted_statistics = gr.Markdown(elem_id="adapted-statistics")
        with gr.Column(min_width=300):
            gr.Markdown("### Base model")
            base = gr.Markdown(elem_id="base", buttons=["copy"], line_breaks=True)
            base_statistics = gr.Markdown(elem_id="base-statistics")
    gr.Markdown("### Mix the experts yourself\nDrag a weight, and the prompt is answered again.")
    with gr.Group():
        sliders = {
            name: gr.Slider(
                0,
                1,
                value=0,
                step=0.01,
                label=f"Weight of the expert “{name}”",
                elem_id=f"weight-{name}",
                visible=name in experts,
            )
            for name in all_experts
        }
        give_back = gr.Button("Let the dispatch decide the weights", size="sm", elem_id="give-back")
    # Not in an accordion: a plot that is updated in one that is closed stays empty (Gradio 6.31).
    changes = gr.Plot(change_map({}), label="Where the model changed", elem_id="changes")
    with gr.Accordion("Settings", open=False):
        dispatch = gr.Radio(
            dispatch_choices(loader.model_name),
            value=DEFAULT_DISPATCH,
            label="Dispatch",
            info="Who decides the weights",
            elem_id="dispatch",
        )
        max_new_tokens = gr.Slider(1, 1024, value=128, step=1, label="Max new tokens")
        temperature = gr.Slider(
            0, 2, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest token"
        )
        top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p")
        seed = gr.Number(0, precision=0, label="Seed", info="Of the draws where the temperature is not 0")
        facts = gr.Markdown("The model is loading.", elem_id="facts")

    stops = Stops()

    # Handlers that ask who calls cannot be `partial`s.
    def run_prompt(
        request: gr.Request,
        prompt: str,
        dispatch: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        picture: str | None = None,
        *weights: float,
    ) -> Iterator[list]:
        settings, session = (max_new_tokens, temperature, top_p, seed), request.session_hash
        with stops.of(session) as stopped:
            yield from _answer(loader, list(sliders), session, stopped, prompt, dispatch, settings, picture, weights)

    def stop_answer(request: gr.Request) -> None:
        stops.stop(request.session_hash)

    answers = (adapted, adapted_statistics, base, base_statistics)
    run = gr.on(
        [answer.click, prompt.submit],
        run_prompt,
        inputs=[prompt, dispatch, max_new_tokens, temperature, top_p, seed, picture, *sliders.values()],
        outputs=[answer, stop, status, bars, reasons, changes, *answers, *sliders.values()],
        js=answering.BEGIN,
        api_name="answer",
        show_progress="hidden",
        trigger_mode="once",
        concurrency_limit=_ANSWERS_AT_A_TIME,
    )
    run.then(js=answering.END)
    stop.click(js=answering.STOP, inputs=status, outputs=status)
    # Gradio's own way to cancel shows an "Error" where an answer is begun soon after another one was stopped (6.31).
    stop.click(stop_answer, queue=False, api_visibility="private")
    examples.load_input_event.then(js=answering.ANSWER, inputs=prompt)
    # Chosen in the browser: a prompt sent right after a slider was moved would be on its way before a server's reply.
    for slider in sliders.values():
        slider.input(js=_constant(MANUAL), outputs=dispatch)
        slider.release(js=answering.ANSWER, inputs=prompt)
    give_back.click(js=_constant(DEFAULT_DISPATCH), outputs=dispatch)
    return AnswerTab(picture_place, status, facts, dispatch, bars, sliders, answers)


def _constant(value: str) -> str:
    """The JavaScript of a handler that gives `value`."""
    return f"() => {json.dumps(value)}"


def _experts(pool: str) -> list[str]:
    """The names of a model's experts, known before it is loaded."""
    return [file.stem for file in expert_files(pool)]


def dispatch_choices(model_name: str) -> list[tuple[str, str]]:
    """The ways to decide, with what they are called on the page; the kept mixtures are among them."""
    found = [(f"Found by a search: {name}", few_shot(name)) for name in kept_mixtures(model_name)]
    return [(_DISPATCH_TITLES[name], name) for name in DISPATCHERS] + found


def _answer(
    loader: EngineLoader,
    experts: Sequence[str],
    session: str | None,
    stopped: threading.Event,
    prompt: str,
    dispatch: str,
    settings: tuple[float, float, float, float | None],
    picture: str | None,
    weights: Sequence[float],
) -> Iterator[list]:
    """Update the page with every event of the answer; whatever goes wrong ends as a sentence in the status line.

    Args:
        stopped: ends the answer once it is set.
        settings: longest answer in tokens, temperature, top-p and seed, as the page has them.
    """
    page = _AnswerView(experts, moves_sliders=dispatch != MANUAL)

    def go_on() -> None:
        if stopped.is_set():
            raise _Stopped

    try:
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"The prompt is {len(prompt):,} characters long; this page takes at most {MAX_PROMPT_CHARACTERS:,}."
            )
        image = None if picture is None else read_picture(Path(picture).read_bytes())
        yield page.running("Reading the prompt…")
        while (engine := loader.engine(LOAD_POLL_SECONDS)) is None:
            go_on()
        # Another window of this page may have chosen another model meanwhile: only its own experts take part.
        names = {expert.name for expert in engine.model.experts}
        given = {name: weight for name, weight in zip(experts, weights, strict=True) if name in names}
        by_hand = given if dispatch == MANUAL else None
        dispatcher = engine.dispatcher(dispatch, by_hand, session)
        max_new_tokens, temperature, top_p, seed = settings
        sampling = Sampling(int(max_new_tokens), temperature, top_p, int(seed or 0))
        with closing(engine.answer(prompt, dispatcher, sampling, image, session)) as events:
            for event in events:
                go_on()
                if (update := page.event(event)) is not None:
                    yield update
    except _Stopped:
        yield page.ended("Stopped.")
    except Exception as error:  # noqa: BLE001  whatever it was, the person who asked must see it
        yield page.ended(failure(error, "an answer"))


class _AnswerView:
    """What the page shows of an answer so far; each method returns the updates of one moment, in the outputs' order.

    Args:
        experts: whose sliders there are.
        moves_sliders: show the weights there too; else somebody has a slider in hand.
    """

    def __init__(self, experts: Sequence[str], moves_sliders: bool = True):
        self._experts, self._moves_sliders = experts, moves_sliders
        self._texts = {"adapted": "", "base": ""}
        self._status = ""
        self._waiting = False
        # What the next update shows too, and when tokens were last shown at once.
        self._kept: dict[str, str] = {}
        self._shown = -math.inf

    def running(self, status: str) -> list:
        self._status = status
        return self._update(running=True, status=status)

    def ended(self, sentence: str) -> list:
        return self._update(running=False, status=sentence)

    def event(self, event: Event) -> list | None:
        """None for a token that the next update shows too, soon enough for whoever reads along."""
        if isinstance(event, Dispatched):
            return self._dispatched(event)
        if isinstance(event, Finished):
            return self._update(running=False, adapted=event.adapted, base=event.base)
        if isinstance(event, Waiting):
            self._waiting = True
            return self._update(status=f"{self._status} · others are served, for {event.seconds:.0f} s now")
        self._texts[event.stream] += event.text
        tokens = "1 token" if event.tokens == 1 else f"{event.tokens} tokens"
        statistics = f"{tokens} · {event.seconds:.1f} s · {event.tokens / event.seconds:.1f} tokens/s"
        self._kept |= {event.stream: self._texts[event.stream], f"{event.stream}_statistics": statistics}
        # Never else: it would take the place of "Stopping…".
        if self._waiting:
            self._kept["status"], self._waiting = self._status, False
        now = time.monotonic()
        if event.paired or now - self._shown < _UPDATE_SECONDS:
            return None
        self._shown = now
        return self._update()

    def _dispatched(self, event: Dispatched) -> list:
        self._status, self._waiting = _describe(event), False
        # Only here do the answers before give way: a prompt that is refused leaves them.
        cleared = dict.fromkeys(("adapted", "base", "adapted_statistics", "base_statistics"), "")
        return self._update(
            status=self._status,
            bars=mixture_bars(event.weights),
            reasons=_reasons(event),
            changes=change_map(event.changes),
            weights=event.weights if self._moves_sliders else None,
            **cleared,
        )

    def _update(self, running: bool | None = None, weights: Mapping[str, float] | None = None, **values) -> list:
        values, self._kept = self._kept | values, {}
        named = ("status", "bars", "reasons", "changes", "adapted", "adapted_statistics", "base", "base_statistics")
        return [
            *run_buttons(running),
            *(values.get(name, gr.skip()) for name in named),
            *(gr.skip() if weights is None else _slider(weights.get(name)) for name in self._experts),
        ]


def _slider(weight: float | None) -> dict:
    """The update of a slider; the model has no expert for one that has no weight."""
    return gr.update(value=weight or 0, visible=weight is not None)


def _reasons(event: Dispatched) -> object:
    """The figure of what was decided by: probabilities of the categories, or the trace of a search."""
    return search_trace(event.trace) if event.trace else probability_bars(event.probabilities or {})


def _describe(event: Dispatched) -> str:
    if event.label is None:
        return event.note or "Weights set by hand."
    confidence = f" · {event.probabilities[event.label]:.0%} sure" if event.probabilities else ""
    note = f" · {event.note}" if event.note else ""
    return f"Detected task: **{event.label}**{confidence} · first pass {event.seconds:.2f} s{note}"
