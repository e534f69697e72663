"""The page as a whole: its looks, its tabs, and the wait for the model."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import gradio as gr

from t2app.catalogue import CATALOGUE
from t2app.loading import EngineLoader
from t2app.ui.answer import build_answer_tab, dispatch_choices
from t2app.ui.search import build_search_tab

if TYPE_CHECKING:
    from t2app.engine import Engine

TITLE = "Transformer²"
_LOAD_POLL_SECONDS = 0.3

THEME = gr.themes.Soft(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
#adapted, #base { min-height: 9rem; border-radius: 4px; padding: 0.25rem 3rem 0.25rem 1rem; overflow-wrap: anywhere; }
#adapted { border-left: 4px solid var(--primary-500); }
#base { border-left: 4px solid var(--neutral-400); }
#adapted-statistics, #base-statistics { font-size: 0.85rem; opacity: 0.8; min-height: 1.4rem; }
#status, #search-status { min-height: 1.8rem; }
.js-plotly-plot text { fill: var(--body-text-color) !important; }
"""


def build_page(loader: EngineLoader) -> gr.Blocks:
    """The whole page, over an engine that may still be loading."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(
            f"# {TITLE}\nA language model that adapts itself to your prompt while you watch: a first pass sees what "
            "the prompt asks for and mixes experts, a second pass answers, adapted and as it was, side by side."
        )
        with gr.Tab("Answer"):
            answer_tab = build_answer_tab(loader)
        with gr.Tab("Search a mixture"):
            build_search_tab(loader, answer_tab.dispatch)
        page.load(
            lambda: gr.update(choices=dispatch_choices(loader.model_name)),
            outputs=answer_tab.dispatch,
            api_visibility="private",
        )
        page.load(
            partial(_watch_loading, loader),
            outputs=[answer_tab.status, answer_tab.facts, answer_tab.picture_place],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
    return page


def _watch_loading(loader: EngineLoader) -> Iterator[tuple]:
    """Say what the loading is doing until the engine is there, then what is known of the model and what it takes."""
    try:
        while (engine := loader.engine(timeout=_LOAD_POLL_SECONDS)) is None:
            share = "" if loader.share is None else f" {loader.share:.0%}"
            yield f"{loader.message}…{share}", gr.skip(), gr.skip()
        yield "Ready.", _facts(engine, loader.experts_of), gr.update(visible=engine.model.takes_pictures)
    except Exception as error:  # noqa: BLE001  whatever it was, the person who waits for it must see it
        yield f"⚠️ The model could not be loaded: {error}", f"No model: {error}", gr.skip()


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
