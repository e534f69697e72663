"""The page: Gradio Blocks over the engine's events, a file a tab. It knows events and figures, never tensors, and
imports nothing that loads torch: the page is there first, the model comes behind it.
"""

import t2app.ui.gradio_import  # noqa: F401  before the others, which import Gradio themselves
from t2app.ui.page import CSS, THEME, TITLE, build_page

__all__ = ["CSS", "THEME", "TITLE", "build_page"]
