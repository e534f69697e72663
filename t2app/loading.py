"""Loading an engine behind a page that is already there."""

import threading

from t2app.engine import Engine
from t2app.models import load_model


class EngineLoader:
    """Loads a model in a thread of its own from the moment it is made.

    Attributes:
        message, share: what is being done now, and how much of it is done where that is known.
    """

    def __init__(self, model_name: str, precision: str):
        self.model_name = model_name
        self.message, self.share = "Starting", None
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._done = threading.Event()
        threading.Thread(target=self._load, args=(model_name, precision), daemon=True).start()

    def engine(self, timeout: float | None = None) -> Engine | None:
        """The engine, or None where it is not there after `timeout` seconds; raises what the loading raised."""
        self._done.wait(timeout)
        if self._error is not None:
            raise self._error
        return self._engine

    def _load(self, model_name: str, precision: str) -> None:
        try:
            self._engine = Engine(load_model(model_name, precision, progress=self._report))
        except Exception as error:  # noqa: BLE001  it is raised again by `engine`, where somebody can see it
            self._error = error
        finally:
            self._done.set()

    def _report(self, message: str, share: float | None) -> None:
        self.message, self.share = message, share
