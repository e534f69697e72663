"""The ways to decide a mixture, by the name that the command line and the page use."""

from t2app.dispatch.dispatcher import OTHER, Decision, Dispatcher
from t2app.dispatch.manual import ManualDispatch
from t2app.dispatch.prompt import PromptDispatch

DISPATCHERS = (PromptDispatch.name, ManualDispatch.name)

__all__ = ["DISPATCHERS", "OTHER", "Decision", "Dispatcher", "ManualDispatch", "PromptDispatch"]
