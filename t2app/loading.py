"""Loading an engine behind a page that is already there."""

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2app.engine import Engine


class EngineLoader:
    """Loads a model in a thread of its own once it is started.

    Attributes:
        experts_of: the model whose experts it takes, None where they are its own.
        message, share: what is being done now, and how much of it is done where that is known.
    """

    def __init__(self, model_name: str, precision: str, experts_of: str | None = None):
        self.model_name, self.precision, self.experts_of = model_name, precision, experts_of
        self.message, self.share = "Starting", None
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._done = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._load, daemon=True).start()

    def engine(self, timeout: float | None = None) -> "Engine | None":
        """The engine, or None where it is not there after `timeout` seconds; raises what the loading raised."""
        self._done.wait(timeout)
        if self._error is not None:
            raise self._error
        return self._engine

    def _load(self) -> None:
        try:
            # Imported here and not above: torch and transformers take longer to import than the page takes to be shown.
            from t2app.engine import Engine
            from t2app.models import load_model

            model = load_model(self.model_name, self.precision, progress=self._report, experts_of=self.experts_of)
            self._engine = Engine(model)
        except Exception as error:  # noqa: BLE001  it is raised again by `engine`, where somebody can see it
            self._error = error
        finally:
            self._done.set()

    def _report(self, message: str, share: float | None) -> None:
        self.message, self.share = message, share
