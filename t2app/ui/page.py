"""The page as a whole: its looks, its tabs, and the wait for the model."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import gradio as gr

from t2app.loading import EngineLoader, LoadingError
from t2app.models.catalogue import CATALOGUE, entry_of, title_of
from t2app.ui.answer import AnswerTab, build_answer_tab
from t2app.ui.search import build_search_tab
from t2app.ui.updates import LOAD_POLL_SECONDS

if TYPE_CHECKING:
    from t2app.engine import Engine

TITLE = "Transformer²"

THEME = gr.themes.Soft(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
#adapted, #base { min-height: 9rem; border-radius: 4px; padding: 0.25rem 3rem 0.25rem 1rem; overflow-wrap: anywhere; }
#adapted { border-left: 4px solid var(--primary-500); }
#base { border-left: 4px solid var(--neutral-400); }
#adapted-statistics, #base-statistics { font-size: 0.85rem; opacity: 0.8; min-height: 1.4rem; }
#model input { padding-right: 1.5rem; text-overflow: ellipsis; }
#status, #search-status { min-height: 1.8rem; }
.js-plotly-plot text { fill: var(--body-text-color) !important; }
"""


def build_page(loader: EngineLoader) -> gr.Blocks:
    """The whole page, over an engine that may still be loading."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                gr.Markdown(
                    f"# {TITLE}\nA language model that adapts itself to your prompt while you watch: a first pass sees "
                    "what the prompt asks for and mixes experts, a second pass answers, adapted and as it was, side by "
                    "side."
                )
            with gr.Column(scale=2, min_width=300):
                model = gr.Dropdown(
                    _model_choices([loader.model_name]),
                    value=loader.model_name,
                    label="Model",
                    interactive=False,
                    filterable=False,
                    elem_id="model",
                )
        with gr.Tab("Answer"):
            answer_tab = build_answer_tab(loader)
        with gr.Tab("Search a mixture"):
            build_search_tab(loader, answer_tab.dispatch)
        loading = [model, answer_tab.status, answer_tab.facts, answer_tab.picture_place, *answer_tab.of_model]
        page.load(
            partial(_watch_loading, loader, answer_tab),
            outputs=loading,
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
        model.select(
            partial(_switch, loader, answer_tab),
            inputs=model,
            outputs=[*loading, *answer_tab.answers],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
    return page


def _watch_loading(loader: EngineLoader, tab: AnswerTab) -> Iterator[list]:
    """Updates of model, status, facts, picture's place and what depends on the model, until it is there or failed."""
    same = [gr.skip()] * len(tab.of_model)
    name = loader.model_name
    shown = gr.update(choices=_model_choices(dict.fromkeys((*loader.choices, name))), value=name, interactive=False)
    yield [
        shown,
        f"{loader.message}…",
        gr.skip(),
        gr.update(visible=False),
        *tab.show_model(name, loader.pool_of(name)),
    ]
    try:
        while (engine := loader.engine(timeout=LOAD_POLL_SECONDS)) is None:
            share = "" if loader.share is None else f" {loader.share:.0%}"
            yield [gr.skip(), f"{loader.message}…{share}", gr.skip(), gr.skip(), *same]
        shown = gr.update(choices=_model_choices(loader.choices), interactive=True)
        pictures = gr.update(visible=engine.model.takes_pictures)
        yield [shown, "Ready.", _facts(engine, loader.experts_of), pictures, *same]
    except Exception as error:  # noqa: BLE001  whatever it was, the person who waits for it must see it
        # None is chosen, so that any of them can be, this one again too.
        shown = gr.update(choices=_model_choices(loader.choices), value=None, interactive=True)
        yield [shown, f"⚠️ The model could not be loaded: {error}", f"No model: {error}", gr.skip(), *same]


def _switch(loader: EngineLoader, tab: AnswerTab, model_name: str) -> Iterator[list]:
    """Load another model in place of the one that answers, and show what is being done."""
    kept = [gr.skip()] * len(tab.answers)
    try:
        loader.switch(model_name)
    except LoadingError as error:
        unchanged = [gr.skip()] * (2 + len(tab.of_model))
        yield [loader.model_name, f"⚠️ {error}", *unchanged, *kept]
        return
    # The answers that stand there are the former model's.
    for number, updates in enumerate(_watch_loading(loader, tab)):
        yield [*updates, *(kept if number else [""] * len(tab.answers))]


def _model_choices(names: Iterable[str]) -> list[tuple[str, str]]:
    """Models with what they are called on the page."""
    return [(_model_title(name), name) for name in names]


def _model_title(name: str) -> str:
    entry = entry_of(name)
    if entry is None:
        return title_of(name)
    gated = ", for those who have accepted its licence" if entry.gated else ""
    return f"{entry.title} ({entry.licence}{gated}, {entry.download_bytes / 1e9:.1f} GB)"


def _facts(engine: "Engine", experts_of: str | None) -> str:
    model = engine.model
    licence = f", {CATALOGUE[model.name].licence}" if model.name in CATALOGUE else ""
    lines = [f"**{model.name}** ({model.parameters / 1e6:.0f} M parameters{licence}), held in {model.precision}."]
    lines += [
        f"- expert **{expert.name}** ({expert.parameters:,} numbers): {expert.description}" for expert in model.experts
    ]
    if experts_of is not None:
        lines.append(f"\nThe experts are those of **{experts_of}**, trained on its weights and not on this model's.")
    return "\n".join(lines)
