"""Pictures beside prompts, on small random models of three classes: decoding against transformers' own `generate`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn
from transformers import AutoModelForImageTextToText
from vision_models import VISION_CLASSES

from t2app.cli import main
from t2app.decoding import Batch, collected, decode
from t2app.engine import Engine, PromptError
from t2app.experts import Expert, ExpertError, load_expert, mix, save_expert
from t2app.messages import MANUAL, Dispatched, Sampling
from t2app.models.catalogue import DEFAULT_MODEL
from t2app.models.model import Model, load_model
from t2app.pictures import PictureError, read_picture
from t2app.spectral import Deltas, SpectralModel, basis_of, linear_layer
from t2app.spectral.layer_paths import is_mlp_path

QUESTION = "What is in this picture?"
GREEDY = Sampling(max_new_tokens=12)


def drawing(size: tuple[int, int] = (90, 60)) -> Image.Image:
    """A real picture: a shape on a gradient."""
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    ImageDraw.Draw(picture).ellipse((10, 10, size[0] // 2, size[1] - 10), fill="red", outline="blue", width=3)
    return picture


@pytest.fixture(scope="module", params=VISION_CLASSES)
def folder(request, vision_folder) -> str:
    return str(vision_folder(request.param))


@pytest.fixture(scope="module")
def seeing(folder, tmp_path_factory) -> Model:
    """A vision-language model with all linear layers of its language tower adapted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return load_model(folder, precision="fp32", layers=lambda path: True)


def plain_model(folder: str) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def mixture_of(model: Model) -> Deltas:
    generator = torch.Generator().manual_seed(0)
    layers = model.adapted.layers.items()
    return {path: 0.5 * torch.randn(layer.rank, generator=generator) for path, layer in layers}


def write_into_weights(model: nn.Module, mixture: Deltas) -> None:
    """The weights as the method defines them: W' = U diag(σ ⊙ z) Vᵀ."""
    with torch.no_grad():
        for path, delta in mixture.items():
            weight = model.get_submodule(path).weight
            u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
            weight.copy_((u * (sigma * (1 + delta.double()))) @ vt)


def generate(model: nn.Module, ids: list[int], picture: Mapping[str, torch.Tensor] | None = None) -> list[int]:
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            **(picture or {}),
        )
    return output[0, len(ids) :].tolist()


def answers(model: Model, ids: list[int], mixtures: list[Deltas | None], picture=None) -> list[list[int]]:
    rows = [ids] * len(mixtures)
    return collected(decode(model.adapted, rows, mixtures, GREEDY, model.eos_ids, picture=picture))


def test_rows_with_a_picture_are_what_generate_gives_of_the_plain_and_of_the_written_weights(seeing, folder):
    ids, picture = seeing.picture_prompt(QUESTION, drawing())
    mixture = mixture_of(seeing)
    base, adapted = answers(seeing, ids, [None, mixture], picture)
    reference = plain_model(folder)
    assert base == generate(reference, ids, picture)
    write_into_weights(reference, mixture)
    assert adapted == generate(reference, ids, picture)
    assert base != adapted


def test_picture_matters_and_its_size_too(seeing):
    rows = []
    for image in (drawing(), Image.effect_noise((90, 60), 90), drawing((60, 120))):
        ids, picture = seeing.picture_prompt(QUESTION, image)
        rows.append(tuple(answers(seeing, ids, [None], picture)[0]))
    assert len(set(rows)) == 3


def test_language_tower_is_adapted_and_every_other_module_is_the_one_that_was_there(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    plain = load_model(folder, precision="fp32", layers=lambda path: False).adapted.model
    before = dict(plain.named_modules())
    tower = plain.get_decoder()
    inside = next(path for path, module in before.items() if module is tower)
    adapted = load_model(folder, precision="fp32", layers=lambda path: True)
    assert len(adapted.adapted.layers) == 2 * 7 == len(adapted.identity.ranks)
    assert all(path.startswith(f"{inside}.layers.") for path in adapted.adapted.layers)
    outside = {path: module for path, module in before.items() if not path.startswith(inside)}
    assert any("vision" in path or "visual" in path for path in outside)
    SpectralModel(plain, {path: basis_of(linear_layer(plain, path).weight) for path in adapted.adapted.layers})
    after = dict(plain.named_modules())
    assert all(after[path] is module for path, module in outside.items())


def test_prompt_without_a_picture_is_answered_as_by_generate_even_between_tokens_of_one_with_a_picture(seeing, folder):
    ids, picture = seeing.picture_prompt(QUESTION, drawing())
    words = seeing.prompt_ids("Why is the sky blue?")
    mixture = mixture_of(seeing)
    reference = plain_model(folder)
    alone = answers(seeing, ids, [None, mixture], picture)
    assert answers(seeing, words, [None])[0] == generate(reference, words)
    seen = decode(seeing.adapted, [ids, ids], [None, mixture], GREEDY, seeing.eos_ids, picture=picture)
    read = decode(seeing.adapted, [words], [None], GREEDY, seeing.eos_ids)
    turns = list(zip(seen, read, strict=False))
    assert [turn[1][0] for turn in turns] == generate(reference, words)[: len(turns)]
    for row, tokens in enumerate(alone):
        assert [turn[0][row] for turn in turns if row in turn[0]] == tokens[: len(turns)]


def test_prompts_with_a_picture_and_without_are_answered_in_one_batch_as_alone(seeing):
    words, mixtures = seeing.prompt_ids("Why is the sky blue?"), [None, mixture_of(seeing)]
    small, large = (seeing.picture_prompt(QUESTION, drawing(size)) for size in ((90, 60), (60, 120)))
    batch, rows = Batch(seeing.adapted, seeing.eos_ids), {}
    for ids, picture in (small, (words, None), large):
        first = batch.admit([ids] * 2, mixtures, GREEDY, picture=picture)
        rows |= {number: [token] for number, token in first.items()}
        for number, token in batch.step().items():
            rows[number].append(token)
    while batch:
        for number, token in batch.step().items():
            rows[number].append(token)
    alone = [answers(seeing, ids, mixtures, picture) for ids, picture in (small, (words, None), large)]
    assert [rows[number] for number in range(6)] == [row for request in alone for row in request]


def test_row_that_ends_leaves_the_other_as_it_is(seeing):
    ids, picture = seeing.picture_prompt(QUESTION, drawing())
    mixtures = [None, mixture_of(seeing)]
    base, adapted = answers(seeing, ids, mixtures, picture)
    end = next(token for token in base if token not in adapted)
    rows: list[list[int]] = [[], []]
    for step in decode(seeing.adapted, [ids, ids], mixtures, GREEDY, [end], picture=picture):
        for row, token in step.items():
            rows[row].append(token)
    assert rows == [base[: base.index(end) + 1], adapted]


def test_vision_tower_sees_a_picture_once_whatever_the_number_of_rows(seeing):
    ids, picture = seeing.picture_prompt(QUESTION, drawing())
    [tower] = [
        module
        for path, module in seeing.adapted.model.named_modules()
        if path in ("model.vision_model", "model.visual", "model.vision_tower")
    ]
    passes = []
    hook = tower.register_forward_hook(lambda *_: passes.append(1))
    answers(seeing, ids, [None, mixture_of(seeing), None], picture)
    hook.remove()
    assert passes == [1]


def test_prompt_that_holds_the_sign_of_a_picture_is_refused(seeing):
    with pytest.raises(PictureError, match="which stands for a picture; leave it out"):
        seeing.picture_prompt(f"Look: {seeing.processor.image_token}", drawing())


def test_prompts_that_differ_cannot_carry_one_picture(seeing):
    ids, picture = seeing.picture_prompt(QUESTION, drawing())
    with pytest.raises(ValueError, match="a picture belongs to one prompt"):
        next(decode(seeing.adapted, [ids, ids[1:]], [None, None], GREEDY, seeing.eos_ids, picture=picture))


def test_model_that_takes_no_pictures_says_so(tiny):
    with pytest.raises(PictureError, match="tiny takes no pictures; ask without one, or choose a vision-language"):
        tiny.picture_prompt(QUESTION, drawing())


def test_picture_is_read_upright_in_rgb_and_on_white(tmp_path):
    turned = drawing().getexif()
    turned[0x0112] = 6  # the camera was held sideways
    drawing().save(tmp_path / "turned.jpg", exif=turned)
    assert read_picture(tmp_path / "turned.jpg").size == (60, 90)
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "clear.png")
    assert read_picture((tmp_path / "clear.png").read_bytes()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no picture file .*picture.png"),
        (b"hello", "picture.png is no picture that can be read; a PNG, JPEG or WebP is one"),
        (b"", "picture.png is no picture that can be read"),
        ("cut", r"picture.png is a damaged picture, or none \(.*truncated"),
    ],
    ids=["missing", "text", "empty", "cut off"],
)
def test_file_that_is_no_picture_is_refused_with_a_sentence(tmp_path, content, sentence):
    file = tmp_path / "picture.png"
    if content == "cut":
        drawing().save(file)
        content = file.read_bytes()[:200]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PictureError, match=sentence):
        read_picture(file)


@pytest.fixture(scope="module")
def text_experts(tiny, tmp_path_factory) -> Path:
    """A folder of experts with one of `tiny`, whose layers are those of the language towers of two classes."""
    folder = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(1)
    ranks = tiny.identity.ranks.items()
    z = {path: 1 + 0.3 * torch.randn(rank, generator=generator) for path, rank in ranks if is_mlp_path(path)}
    expert = Expert("math", "math", "calculating", tiny.identity, z)
    save_expert(expert, folder / "tiny" / "math.safetensors")
    return folder


def test_experts_of_the_text_model_are_taken_by_the_users_word_and_edit_the_language_tower(
    folder, text_experts, tmp_path, monkeypatch
):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    model = load_model(folder, "fp32", experts_folder=text_experts, experts_of="tiny")
    [expert] = model.experts
    assert expert.weights == model.identity and set(expert.z) == set(model.adapted.layers)
    assert len(expert.z) == 2 * 3 and all(path in model.identity.ranks for path in expert.z)
    mixture = mix(model.experts, {"math": 1.0})
    ids, picture = model.picture_prompt(QUESTION, drawing())
    reference = plain_model(folder)
    write_into_weights(reference, mixture)
    assert answers(model, ids, [None, mixture], picture)[1] == generate(reference, ids, picture)


def test_without_that_word_they_are_refused_with_how_to_give_it(folder, text_experts, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    own = tmp_path / "experts" / Path(folder).name
    shutil.copytree(text_experts / "tiny", own)
    with pytest.raises(ExpertError, match="was trained on other weights .*take its experts with --experts-of tiny"):
        load_model(folder, "fp32", experts_folder=tmp_path / "experts")


def test_experts_of_a_model_with_other_layers_or_without_any_are_refused(tiny_folder, real, text_experts):
    with pytest.raises(ExpertError, match="there are no experts of 'nobody' in .*nobody"):
        load_model(str(tiny_folder), "fp32", experts_folder=text_experts, experts_of="nobody")
    with pytest.raises(ExpertError, match=r"'model.layers.0.mlp.\w+' has shape \(32,\); \(576,\) was expected"):
        load_expert(text_experts / "tiny" / "math.safetensors", real.identity, adopted=True)


@pytest.fixture
def picture_file(tmp_path) -> str:
    file = tmp_path / "drawing.png"
    drawing().save(file)
    return str(file)


def test_engine_answers_a_prompt_with_a_picture_and_counts_the_picture_in_its_length(seeing):
    engine = Engine(seeing)
    ids, picture = seeing.picture_prompt(QUESTION, drawing())
    first, *_, last = engine.answer(QUESTION, engine.dispatcher(MANUAL, {}), GREEDY, drawing())
    assert isinstance(first, Dispatched)
    [tokens] = answers(seeing, ids, [None], picture)
    assert last.base == last.adapted == seeing.tokenizer.decode(tokens, skip_special_tokens=True)
    most = Sampling(max_new_tokens=seeing.context_length - len(ids) + 1)
    with pytest.raises(PromptError, match=f"The prompt with its picture is {len(ids):,} tokens long"):
        next(engine.answer(QUESTION, engine.dispatcher(MANUAL, {}), most, drawing()))


def test_command_line_answers_about_a_picture(vision_folder, picture_file, capsys):
    folder = str(vision_folder("idefics3"))
    command = ["answer", QUESTION, "--image", picture_file, "--model", folder, "--max-new-tokens", "4", "--json"]
    main([*command, "--dispatch", "prompt"])
    first, *tokens, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["event"], last["event"]) == ("dispatched", "finished")
    assert {token["stream"] for token in tokens} == {"base", "adapted"} and last["tokens"] == 8
    with pytest.raises(SystemExit, match=r"error: .*mlp.\w+' has shape \(576,\); \(32,\) was expected"):
        main([*command, "--experts-of", DEFAULT_MODEL])


def test_command_line_refuses_what_is_no_picture_and_a_model_that_takes_none(tiny_folder, picture_file, tmp_path):
    command = ["answer", QUESTION, "--model", str(tiny_folder), "--image"]
    with pytest.raises(SystemExit, match="error: .*conftest.py is no picture that can be read"):
        main([*command, str(Path(__file__).with_name("conftest.py"))])
    with pytest.raises(SystemExit, match="error: tiny takes no pictures"):
        main([*command, picture_file])
