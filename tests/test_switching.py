"""One model in place of another behind the page, and what does not fit into memory: who waits, and what is freed."""

import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from t2app.engine import Engine, EngineError
from t2app.key_values import GrowingCache
from t2app.loading import EngineLoader, LoadingError
from t2app.messages import MANUAL, PROMPT, Finished, Sampling
from t2app.models.catalogue import DEFAULT_MODEL

PROMPT_TEXT = "Why is the sky blue?"
SHORT = Sampling(max_new_tokens=12)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A checkpoint of the test's own."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "own"))


@pytest.fixture
def loader(folder) -> EngineLoader:
    """It has loaded the checkpoint of `folder`; the embedded model can be chosen too."""
    loading = EngineLoader(str(folder), "fp32")
    loading.start()
    loading.engine()
    return loading


def answer(engine: Engine, sampling: Sampling = SHORT) -> list:
    return list(engine.answer(PROMPT_TEXT, engine.dispatcher(MANUAL, {}), sampling))


def test_answer_in_progress_ends_before_the_model_gives_way_and_one_that_waits_is_told(loader):
    former = loader.engine()
    stream = former.answer(PROMPT_TEXT, former.dispatcher(MANUAL, {}), SHORT)
    next(stream)
    loader.switch(DEFAULT_MODEL)
    assert loader.engine(timeout=1) is None
    assert loader.message == "Waiting until no answer is being written"
    told: list[str] = []

    def wait_for_a_turn() -> None:
        try:
            answer(former)
        except EngineError as error:
            told.append(str(error))

    late = threading.Thread(target=wait_for_a_turn)
    late.start()
    assert isinstance(list(stream)[-1], Finished)
    late.join(60)
    assert told == [] or "Another model is taking the place" in told[0]
    assert loader.engine().model.name == DEFAULT_MODEL
    with pytest.raises(EngineError, match="Another model is taking the place of this one"):
        answer(former)


def test_former_model_is_freed_and_can_be_chosen_again_where_the_next_cannot_be_loaded(loader, folder):
    loader.switch(DEFAULT_MODEL)
    loader.engine()
    freed = weakref.ref(loader.engine().model.adapted.model)
    moved = folder.rename(folder.with_name("away"))
    loader.switch(str(folder))
    with pytest.raises(LoadingError, match=f"the model '{folder}' cannot be loaded"):
        loader.engine()
    # The next one was not even begun: what is gone went before it.
    assert freed() is None
    loader.switch(DEFAULT_MODEL)
    assert loader.engine().model.name == DEFAULT_MODEL
    moved.rename(folder)
    loader.switch(str(folder))
    assert isinstance(answer(loader.engine())[-1], Finished)


def test_only_models_that_are_offered_can_be_chosen_and_one_at_a_time(loader, folder):
    assert loader.choices[:2] == (str(folder), DEFAULT_MODEL)
    with pytest.raises(LoadingError, match="There is no model 'nobody/no-such-model' to choose"):
        loader.switch("nobody/no-such-model")
    engine = loader.engine()
    loader.switch(str(folder))
    assert loader.engine() is engine
    loader.switch(DEFAULT_MODEL)
    with pytest.raises(LoadingError, match=f"{DEFAULT_MODEL} is still being loaded"):
        loader.switch(str(folder))
    loader.engine()


def test_fixed_model_is_the_only_one_to_choose(folder):
    loading = EngineLoader(str(folder), "fp32", fixed=True)
    loading.start()
    loading.engine()
    assert loading.choices == (str(folder),)
    with pytest.raises(LoadingError, match=f"no model '{DEFAULT_MODEL}' to choose"):
        loading.switch(DEFAULT_MODEL)


@pytest.fixture
def fail_at(tiny) -> Callable[[int], list[weakref.ref]]:
    """Lets the GPU's memory fall short in the forward pass of this number; gives what the passes computed into."""
    hooks = []

    def fail(number: int) -> list[weakref.ref]:
        caches: list[weakref.ref] = []

        def hook(module, arguments, options) -> None:
            caches.extend(weakref.ref(value) for value in options.values() if isinstance(value, GrowingCache))
            if len(caches) == number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        hooks.append(tiny.adapted.model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True))
        return caches

    yield fail
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("dispatch", "number"), [(MANUAL, 1), (MANUAL, 5), (PROMPT, 2)])
def test_answer_without_memory_for_it_ends_in_a_sentence_and_the_next_is_answered(tiny, fail_at, dispatch, number):
    engine = Engine(tiny)
    dispatcher = engine.dispatcher(dispatch, {} if dispatch == MANUAL else None)
    expected = answer(engine)[-1]
    caches = fail_at(number)
    with pytest.raises(EngineError, match="The GPU's memory did not suffice") as caught:
        list(engine.answer(PROMPT_TEXT, dispatcher, SHORT))
    # Freed although somebody may still look at the error.
    assert caught.value.__context__ is None
    assert len(caches) == number
    assert [cache() for cache in caches] == [None] * number
    last = answer(engine)[-1]
    assert (last.base, last.adapted) == (expected.base, expected.adapted)


def test_first_pass_is_made_fast_before_anybody_asks():
    loading = EngineLoader(DEFAULT_MODEL, "bf16")
    loading.start()
    adapted = loading.engine().model.adapted
    if torch.cuda.is_available():
        pytest.skip("on a GPU nothing is merged")
    deadline = time.monotonic() + 120
    while any(layer.merged is None for layer in adapted.layers.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(layer.merged is not None for layer in adapted.layers.values())
