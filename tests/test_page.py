"""The page as a person uses it: a real app, driven by a real browser, and the same path through gradio_client."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gradio_client import Client
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from t2app.bench.served_app import served_app
from t2app.found_mixtures import mixture_file, read_mixture
from t2app.models.catalogue import DEFAULT_MODEL, expert_files
from t2app.ui.answer import EXAMPLES

SUM = "Compute 12 + 7. Reply with only the number."
LONG = "Write a long story about a fox that learns to count."
STREAMS = ("adapted", "base")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# A CPU that also runs the browser, and other tests, is slow; nothing here waits this long unless something is wrong.
PATIENCE_MS = 120_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of the app, in a process of its own."""
    with served_app() as app:
        yield app.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, (
        "these tests need Chromium: install Debian's package chromium, or name one in the variable CHROMIUM"
    )
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@contextmanager
def opened_page(browser: Browser, url: str, width: int = 1280, height: int = 1000) -> Iterator[Page]:
    """The page, opened anew in a window of so many pixels, with its model loaded."""
    with browser.new_page(viewport={"width": width, "height": height}) as page:
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        expect(page.locator("#status")).to_contain_text("Ready")
        yield page


@pytest.fixture
def page(url: str, browser: Browser) -> Iterator[Page]:
    with opened_page(browser, url) as page:
        yield page


def ask(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    watch_for_beginning(page)
    page.locator("#answer").click()


def watch_for_beginning(page: Page) -> None:
    """Have the page know in `window.begun` whether an answer was begun, which `wait_until_finished` waits for.

    The button is disabled from the server's first word on: until then the page looks as if all were finished.
    """
    page.evaluate(
        "(() => { const button = document.querySelector('#answer'); window.begun = false;"
        " new MutationObserver(() => { window.begun ||= button.disabled; }).observe(button, {attributes: true}); })()"
    )


def text(page: Page, stream: str) -> str:
    return page.locator(f"#{stream}").inner_text().strip()


def watch(page: Page, stream: str) -> None:
    """Have the page keep how long a stream's text was after every change of it, in `window.seen`.

    An answer of a few tokens is over sooner than it could be looked at twice from here.
    """
    page.evaluate(
        "(stream) => { const element = document.querySelector('#' + stream), lengths = [];"
        " window.seen = {...window.seen, [stream]: lengths};"
        " new MutationObserver(() => lengths.push(element.innerText.trim().length))"
        ".observe(element, {subtree: true, childList: true, characterData: true}); }",
        stream,
    )


def wait_until_finished(page: Page) -> None:
    page.wait_for_function("window.begun")
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#answer")).to_be_enabled()


def set_setting(page: Page, label: str, value: str) -> None:
    field = page.get_by_role("spinbutton", name=label)
    if not field.is_visible():
        page.get_by_role("button", name="Settings").first.click()
    field.fill(value)
    field.press("Tab")


def drawn_weights(page: Page) -> dict[str, float]:
    """The bars as they stand in the page."""
    bars = page.evaluate(
        "(() => { const bar = document.querySelector('#bars .js-plotly-plot').data[0];"
        " return JSON.stringify([Array.from(bar.y), Array.from(bar.x)]); })()"
    )
    return dict(zip(*json.loads(bars), strict=True))


def test_prompt_is_dispatched_and_both_answers_grow_and_finish(page):
    for stream in STREAMS:
        watch(page, stream)
    ask(page, SUM)
    expect(page.locator("#status")).to_contain_text("Detected task: math")
    wait_until_finished(page)
    for stream in STREAMS:
        seen = page.evaluate(f"window.seen.{stream}")
        # Gradio shows there that it waits; then the answer begins with nothing.
        seen = seen[len(seen) - 1 - seen[::-1].index(0) :]
        assert seen == sorted(seen) and len(set(seen)) > 2, f"{stream} did not grow: {seen}"
        expect(page.locator(f"#{stream}-statistics")).to_contain_text("tokens/s")
    assert "19" in text(page, "adapted")
    assert {name: weight for name, weight in drawn_weights(page).items() if weight} == {"math": 1}
    assert page.locator("#weight-math input[type=number]").input_value() == "1"


def test_moved_slider_decides_the_weights_until_they_are_given_back(page):
    # On a slow network a reply to the moved slider would come after the prompt is on its way: it must not need one.
    page.route("**/run/**", lambda call: None)
    page.locator("#weight-math input[type=number]").fill("0.35")
    page.locator("#weight-math input[type=number]").press("Tab")
    ask(page, SUM)
    expect(page.locator("#status")).to_contain_text("Weights set by hand")
    wait_until_finished(page)
    drawn = {name: weight for name, weight in drawn_weights(page).items() if weight}
    assert drawn == pytest.approx({"math": 0.35, "base model": 0.65})
    page.locator("#give-back").click()
    ask(page, SUM)
    expect(page.locator("#status")).to_contain_text("Detected task")
    wait_until_finished(page)
    assert {name: weight for name, weight in drawn_weights(page).items() if weight} == {"math": 1}


def drag(page: Page, expert: str, weight: float) -> None:
    """Move an expert's slider by the mouse, and let go of it."""
    slider = page.locator(f"#weight-{expert} input[type=range]")
    slider.scroll_into_view_if_needed()
    watch_for_beginning(page)
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + weight * box["width"], box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()


def test_prompt_is_answered_again_once_a_slider_is_let_go_of(page):
    ask(page, "What is 19 minus 13? Answer with just the number.")
    wait_until_finished(page)
    by_the_expert, base = text(page, "adapted"), text(page, "base")
    assert by_the_expert.endswith("= 6") and not base.endswith("= 6")
    for weight, answer in ((0, base), (1, by_the_expert)):
        drag(page, "math", weight)
        wait_until_finished(page)
        expect(page.locator("#status")).to_contain_text("Weights set by hand")
        assert (text(page, "adapted"), text(page, "base")) == (answer, base)
    assert {name: weight for name, weight in drawn_weights(page).items() if weight} == {"math": 1}


def test_slider_that_is_let_go_of_ends_the_answer_that_is_being_written(page):
    set_setting(page, "number input for Max new tokens", "1024")
    ask(page, LONG)
    expect(page.locator("#base-statistics")).to_contain_text("tokens/s")
    drag(page, "code", 0.5)
    expect(page.locator("#status")).to_contain_text("Weights set by hand")
    expect(page.locator("#weight-code input[type=number]")).not_to_have_value("0")
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped")


def test_slider_that_is_let_go_of_without_a_prompt_changes_nothing(page):
    drag(page, "math", 0.5)
    page.wait_for_timeout(1500)
    expect(page.locator("#status")).to_have_text("Ready.")
    expect(page.locator("#answer")).to_be_enabled()


def test_stop_ends_the_answer_and_the_next_prompt_is_answered_at_once(page):
    set_setting(page, "number input for Max new tokens", "1024")
    ask(page, LONG)
    expect(page.locator("#base-statistics")).to_contain_text("tokens/s")
    page.locator("#stop").click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    wait_until_finished(page)
    page.wait_for_timeout(1500)
    stopped = text(page, "base")
    page.wait_for_timeout(2000)
    assert text(page, "base") == stopped
    started = time.monotonic()
    ask(page, SUM)
    expect(page.locator("#adapted-statistics")).to_contain_text("tokens/s")
    wait_until_finished(page)
    # 1024 tokens take this machine half a minute and more: the stopped answer is not being computed any longer.
    assert time.monotonic() - started < 15


def test_second_click_while_one_runs_does_nothing(page):
    set_setting(page, "number input for Max new tokens", "64")
    ask(page, LONG)
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#answer")).to_be_disabled()
    page.get_by_label("Prompt", exact=True).press("Enter")
    wait_until_finished(page)
    assert "⚠️" not in page.locator("#status").inner_text()


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("   ", "Type a prompt first."), ("x" * 20_001, "this page takes at most 20,000")],
    ids=["empty", "too long"],
)
def test_prompt_that_cannot_be_answered_gets_a_sentence_and_is_kept(page, prompt, sentence):
    ask(page, prompt)
    expect(page.locator("#status")).to_contain_text(sentence)
    expect(page.locator("#answer")).to_be_enabled()
    assert page.get_by_label("Prompt", exact=True).input_value() == prompt


def drawn(page: Page, figure: str) -> list[dict]:
    """The data of a Plotly figure as it stands in the page."""
    shown = page.locator(f"#{figure} .js-plotly-plot")
    shown.wait_for()
    return json.loads(
        page.evaluate(
            f"JSON.stringify(document.querySelector('#{figure} .js-plotly-plot').data, (key, value) =>"
            " ArrayBuffer.isView(value) ? Array.from(value) : value)"
        )
    )


def test_first_pass_shows_why_and_where_the_model_is_changed(page):
    ask(page, SUM)
    expect(page.locator("#adapted-statistics")).to_contain_text("tokens/s")
    wait_until_finished(page)
    [reasons] = drawn(page, "reasons")
    seen = dict(zip(reasons["y"], reasons["x"], strict=True))
    assert max(seen, key=seen.get) == "math" and sum(seen.values()) == pytest.approx(1)
    [heat] = drawn(page, "changes")
    assert len(heat["y"]) == 7 and heat["x"] == list(range(30))


def type_example(page: Page, prompt: str, answer: str) -> None:
    """Fill the first row of the table of examples as a person does."""
    for column, value in enumerate((prompt, answer)):
        cell = page.get_by_test_id(f"cell-0-{column}")
        cell.dblclick()
        expect(cell.get_by_role("textbox")).to_be_focused()
        page.keyboard.type(value)
        page.keyboard.press("Enter")
        expect(cell).to_contain_text(value)


def search_by_name(page: Page, name: str) -> None:
    page.locator("#name textarea, #name input").first.fill(name)
    page.locator("#search").click()


def test_search_is_watched_kept_and_then_decides_the_answers(page):
    name = "made-by-a-page-test"
    kept = mixture_file(DEFAULT_MODEL, name)
    try:
        page.get_by_role("tab", name="Search a mixture").click()
        type_example(page, "What is 2 + 3?", "5")
        search_by_name(page, name)
        expect(page.locator("#search-status")).to_contain_text("Round 1")
        page.locator("#search-stop").click()
        status = page.locator("#search-status")
        expect(status).to_contain_text("Trying the best again")
        expect(status).to_contain_text(f"Kept as {name}")
        found = read_mixture(kept)
        assert len(found.trace) < 8, "it went on to its last round"
        again = found.reevaluated
        expect(status).to_contain_text(f"{again.right} of {again.answers} answers right")
        *alphas, score = drawn(page, "trace")
        assert [line["name"] for line in alphas] == [file.stem for file in expert_files(DEFAULT_MODEL)]
        assert len(score["x"]) >= 1
        page.get_by_role("tab", name="Answer").click()
        ask(page, SUM)
        expect(page.locator("#status")).to_contain_text(f"The mixture “{name}”, found on 1 example.")
        wait_until_finished(page)
    finally:
        kept.unlink(missing_ok=True)


def test_search_does_not_take_the_place_of_a_mixture_that_somebody_else_kept(page):
    name = "kept-before-a-page-test"
    kept = mixture_file(DEFAULT_MODEL, name)
    kept.parent.mkdir(exist_ok=True)
    try:
        kept.write_text("somebody else's")
        page.get_by_role("tab", name="Search a mixture").click()
        page.locator("#fill").click()
        expect(page.locator("#search-status")).to_contain_text("10 examples of chain-sum")
        search_by_name(page, name)
        expect(page.locator("#search-status")).to_contain_text(f"There is a mixture '{name}' already")
        expect(page.locator("#search")).to_be_enabled()
        assert kept.read_text() == "somebody else's"
    finally:
        kept.unlink()


def test_example_is_answered_once_it_is_chosen_also_in_place_of_another_answer(page):
    ask(page, LONG)
    expect(page.locator("#adapted")).not_to_be_empty()
    label, prompt = next(iter(EXAMPLES.items()))
    page.get_by_role("button", name=label).click()
    expect(page.locator("#adapted")).to_contain_text("= 6")
    wait_until_finished(page)
    assert page.get_by_label("Prompt", exact=True).input_value() == prompt


def test_seed_that_is_none_gets_a_sentence_and_the_next_prompt_an_answer(page):
    # What is typed into settings that are only being opened may not count.
    set_setting(page, "Seed", "3")
    ask(page, SUM)
    expect(page.locator("#adapted")).to_contain_text("= 19")
    wait_until_finished(page)
    set_setting(page, "Seed", "-5")
    ask(page, SUM)
    expect(page.locator("#status")).to_contain_text("⚠️ the seed is -5")
    wait_until_finished(page)
    assert "= 19" in text(page, "adapted")
    set_setting(page, "Seed", "5")
    page.get_by_role("button", name=next(iter(EXAMPLES))).click()
    expect(page.locator("#adapted")).to_contain_text("= 6")


def test_search_without_examples_gets_a_sentence(page):
    page.get_by_role("tab", name="Search a mixture").click()
    page.locator("#search").click()
    expect(page.locator("#search-status")).to_contain_text("holds no example")
    expect(page.locator("#search")).to_be_enabled()


def test_prompt_that_is_refused_leaves_the_answers_before_it(page):
    ask(page, SUM)
    wait_until_finished(page)
    expect(page.locator("#adapted-statistics")).to_contain_text("tokens/s")
    before = text(page, "adapted"), text(page, "base")
    ask(page, "   ")
    expect(page.locator("#status")).to_contain_text("Type a prompt first.")
    assert all(before) and (text(page, "adapted"), text(page, "base")) == before


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone_shows_the_whole_page_without_scrolling_sideways(url, browser, theme):
    with opened_page(browser, f"{url}?__theme={theme}", width=390, height=844) as phone:
        ask(phone, SUM)
        wait_until_finished(phone)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        for element in ("#answer", "#stop", "#bars", "#adapted", "#base", "#weight-math"):
            box = phone.locator(element).first.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, element


def test_same_path_answers_a_program(url):
    client = Client(url, verbose=False)
    weights = [float(file.stem == "math") for file in expert_files(DEFAULT_MODEL)]
    job = client.submit(SUM, "manual", 12, 0, 1, 0, None, *weights, api_name="/answer")
    final = job.result(timeout=120)
    assert len(job.outputs()) > 3
    assert any("19" in str(value) for value in final)


def test_two_sessions_are_answered_at_once(url):
    weights = [float(file.stem == "math") for file in expert_files(DEFAULT_MODEL)]
    long = Client(url, verbose=False).submit(LONG, "manual", 1024, 0, 1, 0, None, *weights, api_name="/answer")
    while len(long.outputs()) < 4:
        time.sleep(0.1)
    short = Client(url, verbose=False).submit(SUM, "manual", 12, 0, 1, 0, None, *weights, api_name="/answer")
    assert any("19" in str(value) for value in short.result(timeout=120))
    assert not long.done()
    long.cancel()


def choose_model(page: Page, name: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option", name=name).click()


def test_another_model_is_chosen_and_brings_its_own_experts(browser, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "small-random")
    with served_app("--model", str(folder)) as app, opened_page(browser, app.url) as page:
        status, weight = page.locator("#status"), page.locator("#weight-math")
        expect(weight).not_to_be_visible()
        ask(page, SUM)
        wait_until_finished(page)
        assert text(page, "base") == text(page, "adapted")
        choose_model(page, "SmolLM2-135M-Instruct")
        expect(page.locator("#base")).to_be_empty()
        expect(status).to_contain_text("Ready")
        expect(weight).to_be_visible()
        ask(page, SUM)
        expect(status).to_contain_text("Detected task: math")
        wait_until_finished(page)
        assert "19" in text(page, "adapted")
        folder.rename(folder.with_name("away"))
        choose_model(page, "small-random")
        expect(status).to_contain_text("⚠️ The model could not be loaded: the model")
        choose_model(page, "SmolLM2-135M-Instruct")
        expect(status).to_contain_text("Ready")
        ask(page, SUM)
        wait_until_finished(page)
        assert "19" in text(page, "adapted")


def test_picture_beside_the_prompt_is_answered_and_a_file_that_is_none_gets_a_sentence(
    browser, vision_folder, tmp_path
):
    red, text_file = tmp_path / "red.png", tmp_path / "words.png"
    Image.new("RGB", (90, 60), "red").save(red)
    text_file.write_text("no picture")
    with served_app("--model", str(vision_folder("qwen2_vl"))) as app, opened_page(browser, app.url) as page:
        set_setting(page, "number input for Max new tokens", "8")
        answers = []
        for file in (None, red):
            if file is not None:
                page.locator("#picture input[type=file]").set_input_files(file)
                expect(page.locator("#picture img")).to_be_visible()
            ask(page, "What is in this picture?")
            expect(page.locator("#base-statistics")).to_contain_text("8 tokens")
            wait_until_finished(page)
            answers.append(text(page, "base"))
            assert text(page, "adapted") == answers[-1]
        assert answers[0] != answers[1]
        page.reload()
        expect(page.locator("#status")).to_contain_text("Ready")
        page.locator("#picture input[type=file]").set_input_files(text_file)
        expect(page.locator("#picture img")).to_be_attached()
        ask(page, "What is in this picture?")
        expect(page.locator("#status")).to_contain_text("is no picture that can be read")
        expect(page.locator("#answer")).to_be_enabled()


def test_model_that_takes_no_pictures_offers_no_place_for_one(page):
    expect(page.locator("#answer")).to_be_enabled()
    expect(page.locator("#picture")).not_to_be_visible()
