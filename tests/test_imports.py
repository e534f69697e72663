"""What is imported before the page is there, and that it costs no collections."""

import gc
import subprocess
import sys

import pytest

from t2app.imports import kept_imports


def test_page_is_imported_without_torch_and_transformers():
    program = "import sys, app; sys.exit(' '.join({'torch', 'transformers'} & sys.modules.keys()) or 0)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def thawed():
    yield
    gc.unfreeze()


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_what_is_made_meanwhile_is_looked_through_neither_then_nor_later(thawed):
    before, frozen = collections(), gc.get_freeze_count()
    with kept_imports():
        made = [[] for _ in range(100_000)]
    assert collections() == before
    assert gc.get_freeze_count() >= frozen + len(made)
    again = [[] for _ in range(100_000)]
    assert len(again) == 100_000 and collections() > before


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_left_as_it_was_even_by_an_import_that_fails(thawed, enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), kept_imports():
            assert not gc.isenabled()
            import no_such_module  # noqa: F401
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
