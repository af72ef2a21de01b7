"""The page in a real browser: films in, layers, keys, errors, a phone, a screen reader's rules, the time it takes."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright
from serving import Serve, Server, encoded, serving
from tests.corpus import as_integers, make_dicom, save_dicom

from films import draw
from lungscope.cli.analyze import demo_film
from lungscope.readers import read
from lungscope.report import DISCLAIMER

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
#: Milliseconds, median, from a film's choice to its drawing. Two idle cores are held to 1200; a busy machine is not.
DRAWN_MS = float(os.environ.get("LUNGSCOPE_DRAWN_MS", "4000"))
DESKTOP, PHONE = ViewportSize(width=1440, height=900), ViewportSize(width=390, height=844)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def server(serve: Serve, tiny: Path) -> Server:
    return serve("--model", tiny, "--max-upload", "2", "--rate", "0")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Iterator[Open]:
    """Open the page. Nothing that it asks for may lie elsewhere, and nothing may go wrong in its code."""
    wrong: list[str] = []
    contexts = []

    def open_(viewport: ViewportSize = DESKTOP, url: str = server.url, **settings: Any) -> Page:
        context = browser.new_context(viewport=viewport, accept_downloads=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
        page.on("request", lambda asked: None if asked.url.startswith((url, "blob:")) else wrong.append(asked.url))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def choose(page: Page, *films: tuple[str, bytes]) -> None:
    page.set_input_files("#files", [{"name": name, "mimeType": "", "buffer": data} for name, data in films])


def wait_for(page: Page, film: str) -> None:
    """Until the film is drawn."""
    page.wait_for_function("name => performance.getEntriesByName(`drawn ${name}`).length", arg=film, timeout=60_000)


def pixels(page: Page, number: int = 0) -> np.ndarray[Any, Any]:
    """What a viewer shows, RGB u8 [h, w, 3]."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    address = page.locator("canvas").nth(number).evaluate("(canvas) => canvas.toDataURL('image/png')")
    data = base64.b64decode(address.partition(",")[2])
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))


def colourful(picture: np.ndarray[Any, Any]) -> int:
    """How many pixels are not grey."""
    return int(np.count_nonzero(np.ptp(picture.astype(int), axis=2) > 8))


def test_films_are_analysed_and_drawn(open_page: Open, film: bytes) -> None:
    page = open_page()
    expect(page.locator(".disclaimer")).to_have_text(DISCLAIMER)
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    choose(page, ("two.png", encoded(draw(400, 300))))
    expect(page.locator("#list li.done")).to_have_count(2, timeout=30_000)
    expect(page.locator("#panel .film-name")).to_have_text("one.png")
    expect(page.locator("#panel .answer").first).to_have_text("Normal")
    expect(page.locator("#panel .bars li")).to_have_count(3)
    expect(page.locator("#panel")).to_contain_text("Not ruled out at 90 % coverage: Normal.")
    expect(page.locator(".grades td.s3")).to_contain_text("C · 3")
    expect(page.locator("#live")).to_contain_text("Normal")
    page.locator("#list .pick").nth(1).click()
    expect(page.locator("#panel .film-name")).to_have_text("two.png")


def test_the_demo_film_is_one_click_away(open_page: Open) -> None:
    page = open_page()
    page.click("#demo")
    wait_for(page, "RG1_UNCR.dcm")
    expect(page.locator("#panel .facts")).to_contain_text("1841 × 1955 pixels · DICOM")


def test_layers_and_tone_change_what_is_drawn(open_page: Open, film: bytes) -> None:
    page = open_page()
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    all_on = colourful(pixels(page))
    page.uncheck("#evidence-on")
    outlines = colourful(pixels(page))
    page.uncheck("#lungs-on")
    bare = pixels(page)
    assert all_on > outlines > colourful(bare) == 0
    page.check("#zones-on")
    assert colourful(pixels(page)) > outlines
    page.uncheck("#zones-on")
    page.check("#evidence-on")
    strong = pixels(page).astype(int)
    page.locator("#evidence-opacity").fill("20")
    weak = pixels(page).astype(int)
    assert np.abs(strong - bare).sum() > 2 * np.abs(weak - bare).sum() > 0
    page.uncheck("#evidence-on")

    middle = bare[bare.shape[0] // 2, bare.shape[1] // 2, 0]
    assert middle == round(255 * 0.8), "the grey of the film between the lungs"
    page.click("#invert")
    assert pixels(page)[bare.shape[0] // 2, bare.shape[1] // 2, 0] == 255 - middle
    page.click("#invert")
    page.locator("#level").fill("80")
    assert abs(int(pixels(page)[bare.shape[0] // 2, bare.shape[1] // 2, 0]) - 127) <= 2
    page.locator("#window").fill("50")
    lung = pixels(page)[bare.shape[0] // 2, round(bare.shape[1] / 2 - 0.22 * bare.shape[0] * 0.9), 0]
    assert lung == 0
    page.click("[data-do=reset]")
    np.testing.assert_array_equal(pixels(page), bare)
    page.click("[data-do=in]")
    assert (pixels(page) != bare).any()
    page.click("[data-do=fit]")
    np.testing.assert_array_equal(pixels(page), bare)


def test_the_mouse_zooms_moves_and_windows(open_page: Open, film: bytes) -> None:
    page = open_page()
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    box = page.locator("canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    whole = pixels(page)
    page.mouse.move(x, y)
    page.mouse.wheel(0, -400)
    zoomed = pixels(page)
    page.mouse.down()
    page.mouse.move(x + 60, y + 30)
    page.mouse.up()
    moved = pixels(page)
    assert (zoomed != whole).any() and (moved != zoomed).any()
    np.testing.assert_array_equal(moved[200:300, 300:500], zoomed[170:270, 240:440])
    page.keyboard.down("Shift")
    page.mouse.down()
    page.mouse.move(x - 30, y)
    page.mouse.up()
    page.keyboard.up("Shift")
    expect(page.locator("#window-value")).not_to_have_text("100 %")
    page.mouse.dblclick(x, y)
    page.click("[data-do=reset]")
    np.testing.assert_array_equal(pixels(page), whole)


def test_everything_is_reached_by_keyboard(open_page: Open) -> None:
    page = open_page()

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"{selector} is not reached with the Tab key")

    for selector in (".skip", "#theme", "#files", "#demo"):
        tab_to(selector)
    page.keyboard.press("Enter")
    wait_for(page, "RG1_UNCR.dcm")
    expect(page.locator("#live")).to_contain_text("RG1_UNCR.dcm: ")
    tab_to(".pick")
    tab_to("canvas")
    assert "both lungs outlined" in str(page.locator("canvas").get_attribute("aria-label"))
    before = pixels(page)
    for key in ("+", "ArrowLeft", "z"):
        page.keyboard.press(key)
        after = pixels(page)
        assert (after != before).any(), key
        before = after
    expect(page.locator("#zones-on")).to_be_checked()
    page.keyboard.press("i")
    expect(page.locator("#invert")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("[")
    expect(page.locator("#window-value")).to_have_text("95 %")
    page.keyboard.press(".")
    expect(page.locator("#level-value")).to_have_text("53 %")
    page.keyboard.press("r")
    expect(page.locator("#window-value")).to_have_text("100 %")
    page.keyboard.press("c")
    expect(page.locator("canvas")).to_have_count(2)
    page.keyboard.press("c")
    expect(page.locator("canvas")).to_have_count(1)
    tab_to("#evidence-on")
    page.keyboard.press("Space")
    expect(page.locator("#evidence-on")).not_to_be_checked()
    tab_to(".downloads a")


def test_two_films_side_by_side_move_together(open_page: Open, film: bytes) -> None:
    page = open_page()
    choose(page, ("one.png", film), ("two.png", encoded(draw())))
    expect(page.locator("#list li.done")).to_have_count(2, timeout=30_000)
    page.click("#compare")
    wait_for(page, "one.png")
    wait_for(page, "two.png")
    expect(page.locator("figcaption select")).to_have_count(2)
    left, right = pixels(page, 0), pixels(page, 1)
    assert left.shape == right.shape and (left != right).any()
    page.click("[data-do=in]")
    assert (pixels(page, 0) != left).any() and (pixels(page, 1) != right).any()
    page.click("#link")
    page.click("[data-do=fit]")
    np.testing.assert_array_equal(pixels(page, 1), right)
    assert (pixels(page, 0) != left).any()
    page.locator("figcaption select").nth(1).select_option(label="one.png")
    expect(page.locator("#panel .film-name")).to_have_text("one.png")


def test_a_film_is_chosen_by_itself_whatever_was_removed(open_page: Open, film: bytes) -> None:
    page = open_page()
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    choose(page, *((f"{name}.png", film) for name in ("two", "three", "four")))
    expect(page.locator("#list li.done")).to_have_count(4, timeout=30_000)
    page.click("#compare")
    other = page.get_by_label("Film 2", exact=True)
    other.select_option(label="two.png")
    page.get_by_label("Remove three.png").click()
    assert other.locator("option:enabled").all_inner_texts() == ["one.png", "two.png", "four.png"]
    other.select_option(label="four.png")
    expect(page.locator("#panel .film-name")).to_have_text("four.png")


def test_the_other_panes_list_of_films_stays_when_it_is_opened(open_page: Open, film: bytes) -> None:
    page = open_page()
    choose(page, ("one.png", film), ("two.png", film))
    expect(page.locator("#list li.done")).to_have_count(2, timeout=30_000)
    page.click("#compare")
    page.locator("canvas").nth(0).focus()
    other = page.get_by_label("Film 2", exact=True)
    before = other.element_handle()
    other.focus()
    expect(page.locator(".pane").nth(1)).to_have_class(re.compile("active"))
    expect(other).to_be_focused()
    assert before.evaluate("(element) => element.isConnected")


def test_films_that_end_disturb_nobody(open_page: Open, film: bytes) -> None:
    page = open_page()
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    choose(page, ("two.png", film))
    expect(page.locator("#list li.done")).to_have_count(2, timeout=30_000)
    page.locator("#panel summary").first.click()
    page.locator("#panel .downloads a").first.focus()
    choose(page, ("three.png", film))
    expect(page.locator("#list li.done")).to_have_count(3, timeout=30_000)
    expect(page.locator("#panel details").first).to_have_attribute("open", "")
    expect(page.locator("#panel .downloads a").first).to_be_focused()
    page.locator("#list .pick").nth(1).hover()
    page.mouse.down()
    choose(page, ("four.png", film))
    expect(page.locator("#list li.done")).to_have_count(4, timeout=30_000)
    page.mouse.up()
    expect(page.locator("#panel .film-name")).to_have_text("two.png")


def test_a_grade_is_shown_on_its_scores_side_of_a_limit(open_page: Open) -> None:
    page = open_page()
    grades = {0.7846: "0.784", 0.79399: "0.793", 0.794: "0.794", 1.21599: "1.215", 1.216: "1.216", 1.888: "1.888"}
    for grade, words in grades.items():
        zone = {"grade": grade, "extent_percent": 50}
        shown = page.evaluate("async (zone) => (await import('/static/viewer.js')).measured(zone)", zone)
        assert shown == f"grade {words}"


def test_a_mirrored_film_has_its_sides_where_its_header_says(open_page: Open, tmp_path: Path) -> None:
    page = open_page()
    films = {
        name: save_dicom(make_dicom(as_integers(draw(), 12), PatientOrientation=rows), tmp_path / name).read_bytes()
        for name, rows in (("plain.dcm", ["L", "F"]), ("mirrored.dcm", ["R", "F"]))
    }
    choose(page, *films.items())
    expect(page.locator("#list li.done")).to_have_count(2, timeout=30_000)
    page.click("#compare")
    for number, name in enumerate(films, start=1):
        page.get_by_label(f"Film {number}", exact=True).select_option(label=name)
    for name in films:
        wait_for(page, name)
    expect(page.locator(".pane").nth(0)).not_to_have_class(re.compile("mirrored"))
    expect(page.locator(".pane").nth(1)).to_have_class(re.compile("mirrored"))

    def middle(number: int, selector: str) -> float:
        box = page.locator(".pane").nth(number).locator(selector).bounding_box()
        assert box is not None
        return box["x"] + box["width"] / 2

    assert middle(0, ".side.right") < middle(0, "canvas") < middle(0, ".side.left")
    assert middle(1, ".side.left") < middle(1, "canvas") < middle(1, ".side.right")


def test_what_can_not_be_analysed_says_why_and_the_rest_goes_on(open_page: Open, film: bytes) -> None:
    page = open_page()
    evil = "<img src=x onerror=alert(1)>.png"
    choose(page, (evil, b"text"), ("large.png", bytes(3 * 2**20)), ("one.png", film))
    expect(page.locator("#list li.failed")).to_have_count(2, timeout=30_000)
    wait_for(page, "one.png")
    page.locator("#list li.failed .pick").first.click()
    expect(page.locator("[role=alert]")).to_contain_text(f"{evil}: is not an image")
    expect(page.locator("[role=alert]")).to_contain_text("Code: unreadable")
    page.locator("#list li.failed .pick").nth(1).click()
    expect(page.locator("[role=alert]")).to_contain_text("at most 2 MB are taken")
    page.get_by_label(f"Remove {evil}").click()
    expect(page.locator("#list li")).to_have_count(2)
    page.locator("#list li.done .pick").click()
    expect(page.locator("[role=alert]")).to_have_count(0)
    expect(page.locator("#panel .answer").first).to_have_text("Normal")


def test_a_server_that_is_gone_is_told(open_page: Open, tiny: Path, film: bytes) -> None:
    with serving("--model", tiny) as other:
        page = open_page(url=other.url)
        expect(page.locator("#model")).to_contain_text("tiny")
    choose(page, ("one.png", film))
    expect(page.locator("#list li.failed")).to_contain_text("The server does not answer")


def test_warnings_come_first(open_page: Open) -> None:
    page = open_page()
    choose(page, ("small.png", encoded(draw(160, 150))))
    wait_for(page, "small.png")
    cards = page.locator("#panel > section h3").all_inner_texts()
    assert cards[0] == "Check before you rely on this"
    expect(page.locator(".warnings li").first).to_contain_text("Only 150 x 160 pixels")


def test_downloads(open_page: Open, film: bytes, tmp_path: Path) -> None:
    page = open_page()
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    heads = {
        "Overlay PNG": b"\x89PNG",
        "Lungs PNG": b"\x89PNG",
        "Report HTML": b"<!doctype html>",
        "Evidence NPY": b"\x93NUMPY",
    }
    for name, head in heads.items():
        with page.expect_download() as download:
            page.get_by_role("link", name=name, exact=True).click()
        assert download.value.suggested_filename.startswith("one-")
        download.value.save_as(tmp_path / "file")
        assert (tmp_path / "file").read_bytes().startswith(head)
    with page.expect_download() as download:
        page.get_by_role("link", name="Report SR").click()
    download.value.save_as(tmp_path / "file.dcm")
    assert (tmp_path / "file.dcm").read_bytes()[128:132] == b"DICM"
    with page.expect_download() as download:
        page.get_by_role("link", name="JSON", exact=True).click()
    download.value.save_as(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["source"]["path"] == "one.png"


def test_a_result_that_is_gone_is_told(open_page: Open, film: bytes, server: Server) -> None:
    page = open_page()
    expect(page.locator("#kept")).to_have_text("30")
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    link = page.get_by_role("link", name="Overlay PNG")
    address = f"{server.url}{link.get_attribute('href')}"
    assert httpx.delete(address.rpartition("/")[0]).status_code == 204
    for _ in range(2):
        link.click()
        expect(page.locator("#panel [role=alert]")).to_contain_text(
            "Results go 30 minutes after they were last asked for"
        )


def test_nothing_stays_after_the_visit(open_page: Open, film: bytes, server: Server) -> None:
    def told() -> tuple[str, int]:
        """The line of results that are kept, and how many requests deleted any."""
        lines = httpx.get(f"{server.url}metrics").text.splitlines()
        kept = next(line for line in lines if line.startswith("lungscope_results_kept "))
        sent = [float(line.split()[-1]) for line in lines if re.match("lungscope_http_requests_total.*DELETE", line)]
        return kept, int(sum(sent))

    page = open_page()
    kept, sent = told()
    choose(page, ("one.png", film), ("two.png", film))
    expect(page.locator("#list li.done")).to_have_count(2, timeout=30_000)
    assert told()[0] != kept
    page.goto("about:blank")
    for _ in range(100):
        if told()[0] == kept:
            break
        time.sleep(0.05)
    assert told() == (kept, sent + 1), "one request, as a browser drops some of many"


def test_a_phone(open_page: Open, film: bytes) -> None:
    page = open_page(PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)
    choose(page, ("one.png", film))
    wait_for(page, "one.png")
    expect(page.locator("canvas")).to_have_css("touch-action", "pan-y")
    page.tap("#compare")
    page.tap("#compare")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    box = page.locator("canvas").bounding_box()
    assert box is not None and box["width"] > 340 and box["height"] > 300
    page.locator("#panel .downloads").last.scroll_into_view_if_needed()
    expect(page.locator(".disclaimer")).to_be_in_viewport()
    for control in page.locator("button:visible, .downloads a").all():
        size = control.bounding_box()
        assert size is not None and size["height"] >= 36, control.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_page: Open, film: bytes, scheme: str) -> None:
    page = open_page(color_scheme=scheme)

    def check(state: str) -> None:
        found = Axe().run(page).response["violations"]
        bad = [(item["id"], item["nodes"][0]["html"]) for item in found if item["impact"] in ("serious", "critical")]
        assert bad == [], state

    check("empty")
    choose(page, ("small.png", encoded(draw(160, 150))))
    wait_for(page, "small.png")
    choose(page, ("one.png", film), ("text.png", b"text"))
    expect(page.locator("#list li.done")).to_have_count(2, timeout=30_000)
    expect(page.locator("#list li.failed")).to_have_count(1, timeout=30_000)
    for details in page.locator("details").all():
        details.evaluate("(element) => { element.open = true }")
    check("done")
    page.click("#compare")
    check("compared")
    page.locator("#list li.failed .pick").click()
    check("failed")
    page.set_viewport_size(PHONE)
    check("phone")


@pytest.mark.slow
def test_a_large_film_is_drawn_in_time(open_page: Open, tmp_path: Path) -> None:
    """The embedded weights, 2048 x 2048 pixels, from the file's choice to its drawing."""
    grey = np.round(cv2.resize(read(demo_film()).pixels, (2048, 2048)) * 255).astype(np.uint8)
    (tmp_path / "large.png").write_bytes(cv2.imencode(".png", grey)[1].tobytes())
    times = []
    with serving() as server:
        page = open_page(url=server.url)
        for _ in range(6):
            page.goto(server.url)
            page.evaluate(
                "() => addEventListener('change', () => performance.mark('chosen'), { capture: true, once: true })"
            )
            page.set_input_files("#files", tmp_path / "large.png")
            wait_for(page, "large.png")
            times.append(
                page.evaluate(
                    "() => ['drawn large.png', 'chosen'].map((name) => performance.getEntriesByName(name)[0].startTime)"
                    ".reduce((drawn, chosen) => drawn - chosen)"
                )
            )
    # The first film waits for what is loaded once.
    assert statistics.median(times[1:]) <= DRAWN_MS, times
