"""The pages in a real browser: opened from disk, without a network, by mouse and by keyboard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from bundles import write_bundle
from films import OPACITY, draw, save
from programs import program

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra 'dev', is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe, of the extra 'dev', is not installed")

CHROMIUM = Path("/usr/bin/chromium")
FILMS = 200
EVIL = '"><script>document.title = "broken into"<\\script>#é%.png'

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="the Debian package chromium is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `lungscope analyze FOLDER --write html` on `FILMS` files: from clear to wholly opaque lungs, with
    and without an answer, one lung missing, and two files that are no films."""
    root = tmp_path_factory.mktemp("run")
    model = write_bundle(root / "bundle", thresholds=(0.3, 0.7, 0.5))
    spots = [(row, column, 0.17) for row in (0.22, 0.36, 0.5, 0.64, 0.78) for column in (0.28, 0.72)]
    pool = [draw(240, 230, opacities=spots[: 2 * number]) for number in range(6)]
    pool += [np.where(pool[-1] == np.float32(OPACITY), np.float32(0.53), pool[-1])]
    pool += [draw(240, 230, lungs=["left"])]
    saved = [save(root / "pool" / f"{number}.png", film) for number, film in enumerate(pool)]
    films = root / "in"
    films.mkdir()
    for number in range(FILMS - 3):
        os.link(saved[number % len(saved)], films / f"film{number}.png")
    os.link(saved[0], films / EVIL)
    (films / "text.png").write_text("no image")
    (films / "empty.png").touch()
    done = program("analyze", films, "--out", root / "out", "--model", model, "--write", "html")
    assert done.returncode == 1, done.stderr
    return root / "out"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield browser
        browser.close()


class Visit:
    """A page opened from disk, offline, with what it asked for and what it complained of."""

    def __init__(self, browser: sync_api.Browser, path: Path, **options: object) -> None:
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())

    def films(self) -> list[str]:
        return self.page.locator(
            "#films tbody tr td:first-child > a, #films tbody tr.failed td:first-child"
        ).all_inner_texts()

    def found(self) -> str:
        return self.page.locator("#found").inner_text()

    def column(self, number: int) -> list[str]:
        return self.page.locator(f"#films tbody tr:not(.failed) td:nth-child({number})").all_inner_texts()


@pytest.fixture
def visit(browser: sync_api.Browser) -> Iterator[type[Visit]]:
    """Opens a page; at the end of the test no page may have asked for anything but itself, or have complained."""
    visits: list[tuple[Visit, str]] = []

    def opened(path: Path, **options: object) -> Visit:
        made = Visit(browser, path, **options)
        visits.append((made, path.as_uri()))
        return made

    yield opened
    for made, address in visits:
        assert made.complaints == []
        strange = [url for url in made.asked if not url.startswith(("data:image/", address.rsplit("/", 1)[0]))]
        assert strange == []
        assert [url for url in made.asked if url.startswith(("http", "ws", "ftp"))] == []
        made.context.close()


def test_two_hundred_films_open_from_disk_on_one_page(results: Path, visit: type[Visit]) -> None:
    seen = visit(results / "index.html")
    assert {path.name for path in results.iterdir() if path.is_file()} == {"index.html", "results.jsonl", "run.json"}
    assert seen.found() == "200 of 200 films"
    assert len(seen.films()) == 100
    assert seen.page.locator("#place").inner_text() == "Page 1 of 2"
    seen.page.get_by_role("button", name="Next").click()
    assert len(seen.films()) == 100
    assert seen.page.get_by_role("button", name="Next").is_disabled()
    assert len(seen.asked) == 1, "the page itself"
    assert (results / "index.html").stat().st_size < 100_000


def test_films_are_filtered_by_what_they_are(results: Path, visit: type[Visit]) -> None:
    seen = visit(results / "index.html")
    page = seen.page
    page.get_by_role("radio", name="failed").check()
    assert sorted(seen.films()) == ["empty.png", "text.png"]
    assert "is empty (0 bytes)" in page.locator("#films").inner_text()
    page.get_by_role("radio", name="with warnings").check()
    assert seen.found() == "24 of 200 films"
    assert page.get_by_text("lung-missing").count() == 24
    page.get_by_role("radio", name="class and severity contradict").check()
    assert int(seen.found().split()[0]) > 50
    assert set(seen.column(2)) == {"Normal", "No answer\nNormal leads"}
    assert min(int(cell) for cell in seen.column(5)) > 0
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Severity from").fill("1")
    assert all(int(cell) >= 1 for cell in seen.column(5))
    page.get_by_label("Most probable class").select_option("COVID-19")
    assert set(seen.column(2)) == {"COVID-19"}
    assert 0 < len(seen.films()) < 100
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Conformal set").select_option("no class")
    assert set(seen.column(2)) == {"No answer\nNormal leads"}
    assert set(seen.column(4)) == {"none"}
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Probability up to, %").fill("75")
    assert all(float(cell.removesuffix(" %")) <= 75 for cell in seen.column(3))
    assert 0 < int(seen.found().split()[0]) < 200
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Name, path, warning or error").fill("film12 ")
    assert len(seen.films()) == 11, "film12 and film120 to film129"
    page.get_by_role("button", name="Reset").click()
    assert seen.found() == "200 of 200 films"


def test_films_are_sorted_by_keyboard_and_the_choice_outlives_a_look_at_a_film(
    results: Path, visit: type[Visit]
) -> None:
    seen = visit(results / "index.html")
    page = seen.page
    severity = page.get_by_role("button", name="Severity", exact=True)
    severity.focus()
    page.keyboard.press("Enter")
    head = page.locator("th", has=severity)
    assert head.get_attribute("aria-sort") == "descending"
    scores = [int(cell) for cell in seen.column(5)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "ascending"
    scores = [int(cell) for cell in seen.column(5)]
    assert scores == sorted(scores)
    page.get_by_role("button", name="Film").focus()
    page.keyboard.press("Enter")
    names = [name for name in seen.films() if name.startswith("film")]
    assert names[:12] == [f"film{number}.png" for number in range(12)], "2 before 10"
    page.get_by_role("radio", name="films", exact=False).first.focus()
    page.keyboard.press("ArrowRight")
    assert seen.found() == "198 of 200 films"
    page.get_by_label("Name, path, warning or error").focus()
    page.keyboard.type("film7.png")
    page.keyboard.press("Enter")
    assert seen.films() == ["film7.png"]
    page.get_by_role("link", name="film7.png").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/film7/report.html")
    assert page.locator("h1").inner_text() == "film7.png"
    page.go_back()
    assert seen.found() == "1 of 200 films"
    assert page.locator("th", has=page.get_by_role("button", name="Film")).get_attribute("aria-sort") == "ascending"
    page.evaluate("location.hash = 'show=failed'")
    page.wait_for_function("document.getElementById('found').textContent === '2 of 200 films'")
    assert sorted(seen.films()) == ["empty.png", "text.png"]


def test_a_hostile_name_is_a_name_and_its_page_opens(results: Path, visit: type[Visit]) -> None:
    seen = visit(results / "index.html")
    link = seen.page.get_by_role("link", name=EVIL)
    assert link.count() == 1
    link.click()
    seen.page.wait_for_url("**/report.html")
    assert seen.page.locator("h1").inner_text() == EVIL
    assert seen.page.title() == f"{EVIL} · lungscope"


def seen(element: sync_api.Locator) -> NDArray[np.float32]:
    """A picture of an element, f32 [h, w, 3] in 0..255."""
    element.page.mouse.move(0, 0)
    data = np.frombuffer(element.screenshot(), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.float32)


def test_layers_are_switched_and_the_heat_map_fades(results: Path, visit: type[Visit]) -> None:
    page = visit(results / "film6" / "report.html").page
    film = page.locator(".viewer > svg")
    shown = {name: film.locator(f".{name}").first for name in ("lungs", "zones", "evidence")}
    for title, name in (("Lungs", "lungs"), ("Zones", "zones"), ("Evidence", "evidence")):
        assert shown[name].is_visible()
        with_it = seen(film)
        page.get_by_label(title, exact=True).uncheck()
        assert not shown[name].is_visible()
        assert [other for other in shown if not shown[other].is_visible()] == [name]
        assert np.abs(seen(film) - with_it).mean() > 0.2
        page.get_by_label(title, exact=True).focus()
        page.keyboard.press("Space")
        assert shown[name].is_visible()
        assert np.abs(seen(film) - with_it).mean() < 0.02
    slider = page.get_by_label("Opacity of the evidence")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("output").inner_text() == "95 %"
    assert page.locator("#heat").evaluate("heat => getComputedStyle(heat).opacity") == "0.95"
    page.keyboard.press("Home")
    assert page.locator("#heat").evaluate("heat => getComputedStyle(heat).opacity") == "0"


def test_every_control_of_a_film_is_reached_by_keyboard(results: Path, visit: type[Visit]) -> None:
    page = visit(results / "film6" / "report.html").page
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached == ["lungs", "zones", "evidence", "opacity", "How it is defined"]


def test_layers_are_switched_without_a_script(results: Path, visit: type[Visit]) -> None:
    page = visit(results / "film6" / "report.html", java_script_enabled=False).page
    page.get_by_label("Evidence", exact=True).uncheck()
    assert not page.locator("#heat").is_visible()
    assert not page.locator("#opacity").is_visible(), "a slider that does nothing is not shown"


PAGES = ("index.html", "film6/report.html", "film7/report.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(results: Path, visit: type[Visit], name: str, scheme: str) -> None:
    page = visit(results / name, color_scheme=scheme).page
    found = axe.Axe().run(page).response["violations"]
    serious = [(rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")]
    assert serious == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) > 380) == (scheme == "light")


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_needs_no_scrolling_to_the_side(results: Path, visit: type[Visit], name: str) -> None:
    page = visit(results / name, viewport={"width": 375, "height": 700}).page
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_pages_print_on_a4_with_every_film_that_was_found(results: Path, visit: type[Visit], tmp_path: Path) -> None:
    seen = visit(results / "index.html")
    page = seen.page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(seen.films()) == FILMS
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert len(seen.films()) == 100
    page = visit(results / "film6" / "report.html").page
    page.emulate_media(media="print")
    assert not page.get_by_label("Lungs", exact=True).is_visible()
    data = page.pdf(prefer_css_page_size=True)
    assert 1 <= data.count(b"/Type /Page\n") <= 2
    assert b"/MediaBox [0 0 594.95" in data or b"/MediaBox [0 0 595" in data
