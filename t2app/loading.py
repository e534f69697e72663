"""Loading an engine behind a page that is already there, and another one in its place."""

import logging
import threading
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from t2app.imports import kept_imports
from t2app.messages import DEFAULT_DISPATCH, Limits
from t2app.models.catalogue import CATALOGUE, entry_of
from t2app.models.checkpoints import checkpoint_ahead

if TYPE_CHECKING:
    from t2app.engine import Engine


class LoadingError(ValueError):
    """A model could not be loaded, or can't be chosen; the message is for the person who chose it."""


class EngineLoader:
    """Loads a model in a thread of its own once it is started, and others in its place.

    Attributes:
        model_name: the model that is loaded or being loaded.
        choices: the models that can be chosen: the first one, and once it is known those of the catalogue that fit.
        message, share: what is being done now, and how much of it is done where that is known.

    Args:
        experts_of: the model whose experts the first one takes, None where they are its own.
        limits: of what each model decodes at a time, by default those of `Limits`.
        fixed: offer no other model than the first one.
    """

    def __init__(
        self,
        model_name: str,
        precision: str,
        experts_of: str | None = None,
        limits: Limits | None = None,
        fixed: bool = False,
    ):
        self.model_name, self.precision = model_name, precision
        self._limits, self._fixed = limits, fixed
        self._experts_of = {model_name: experts_of}
        self.choices: tuple[str, ...] = (model_name,)
        self.message, self.share = "Starting", None
        self._engine: Engine | None = None
        self._failure: str | None = None
        self._done = threading.Event()
        self._choosing = threading.Lock()

    @property
    def experts_of(self) -> str | None:
        """The other model whose experts the model takes, None where they are its own."""
        return self._experts_of.get(self.model_name)

    def pool_of(self, model_name: str) -> str:
        """The model whose experts a model takes, which mostly is the model itself."""
        return self._experts_of.get(model_name) or model_name

    def start(self) -> None:
        threading.Thread(target=self._load, daemon=True).start()

    def switch(self, model_name: str) -> None:
        """Load another model as soon as the answers that are being written have ended; the former one is freed first.

        Raises:
            LoadingError: it is none of `choices`, or another one is being loaded at the moment.
        """
        with self._choosing:
            if model_name == self.model_name and self._failure is None:
                return
            if not self._done.is_set():
                raise LoadingError(f"{self.model_name} is still being loaded; choose another model when it is there.")
            if model_name not in self.choices:
                raise LoadingError(f"There is no model '{model_name}' to choose; there are {', '.join(self.choices)}.")
            self.model_name = model_name
            self._failure = None
            self._done.clear()
        self.start()

    def engine(self, timeout: float | None = None) -> "Engine | None":
        """The engine, or None where it is not there after `timeout` seconds.

        Raises:
            LoadingError: the model could not be loaded.
        """
        if not self._done.wait(timeout):
            return None
        if self._failure is not None:
            raise LoadingError(self._failure)
        return self._engine

    def _load(self) -> None:
        try:
            if self._engine is not None:
                self._report("Waiting until no answer is being written", None)
                self._engine.close()
                self._engine = None
            self._report("Starting", None)
            checkpoint_ahead(self.model_name, self._report)
            _import_engine(self.precision)
            from t2app.engine import Engine
            from t2app.models.model import load_model

            model = load_model(self.model_name, self.precision, progress=self._report, experts_of=self.experts_of)
            self._engine = Engine(model, self._limits)
            if not self._fixed:
                self.choices = self._models_that_fit()
        except Exception as error:
            if not isinstance(error, ValueError):
                logging.getLogger(__name__).exception("%s could not be loaded", self.model_name)
            # `engine` raises it where somebody can see it: the sentence alone, the error would keep what was loaded.
            self._failure = str(error) or type(error).__name__
        finally:
            engine = self._engine
            self._done.set()
        if engine is not None:
            _prepare_first_pass(engine)

    def _models_that_fit(self) -> tuple[str, ...]:
        from t2app.machine import memory_bytes
        from t2app.models.model import resolve_precision

        precision, memory = resolve_precision(self.precision), memory_bytes()
        first = self.choices[0]
        others = (entry for entry in CATALOGUE.values() if entry is not entry_of(first))
        return (first, *(entry.name for entry in others if entry.fits(precision, memory)))

    def _report(self, message: str, share: float | None) -> None:
        self.message, self.share = message, share


@cache
def _import_engine(precision: str) -> None:
    """Import what loading and answering take, once: torch and transformers take longer than the page takes to be shown.

    The compiler begins beside the import of transformers, the longer of the two.
    """
    with kept_imports():
        from t2app.kernels.build import kernels_ahead

        kernels_ahead(precision)
        import t2app.engine
        import t2app.models.model  # noqa: F401


def _prepare_first_pass(engine: "Engine") -> None:
    """Have what it needs once made before anybody has typed a prompt, unless another model is chosen meanwhile."""
    from t2app.scheduler import EngineError

    with suppress(EngineError):
        engine.dispatcher(DEFAULT_DISPATCH)
