"""The denoising page in a browser: a reader moves through the decode, and nobody else hears of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from browser import open_page
from test_view import make_panel
from unmask.models.masked_lm import MaskedLM
from unmask.view.page import Panel, write_page

PROMPT = "make 29 from 3 8 5"


@pytest.fixture(scope="module")
def panels(tiny_lm: MaskedLM) -> list[Panel]:
    """Two decoders of unlike length on one prompt."""
    specs = ("semi-ar:block_length=16", "ass")
    return [replace(make_panel(tiny_lm, spec, 32, prompt=PROMPT), solved=spec == "ass") for spec in specs]


@pytest.fixture(scope="module")
def file(tiny_lm: MaskedLM, panels: list[Panel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, tiny_lm, PROMPT, panels)
    return path


@pytest.fixture
def page(file: Path) -> Iterator[Any]:
    with open_page(file, fragment="step=3&color=confidence&cell=2") as (page, problems):
        yield page
        assert problems == []


def masked_counts(page: Any) -> list[int]:
    return [canvas.locator(".masked").count() for canvas in page.locator(".canvas").all()]


def expected(panels: list[Panel], step: int) -> list[int]:
    return [int((p.trajectory.step >= step).sum()) for p in panels]


def now(page: Any) -> str:
    return page.locator("#now").inner_text()


def cells_of(found: Any) -> list[int]:
    """The numbers of the cells that a locator finds."""
    return found.evaluate_all("all => all.map(c => +c.dataset.cell)")


def test_the_address_restores_a_moment(page: Any, panels: list[Panel]) -> None:
    assert masked_counts(page) == expected(panels, 3)
    assert now(page) == "step 3 of 16" and page.locator("[value=confidence]").is_checked()
    assert cells_of(page.locator("[aria-pressed=true]")) == [1, 1]
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**#step=4&color=confidence&cell=2")
    page.evaluate("location.hash = 'step=99&color=nonsense'")
    page.wait_for_function("document.getElementById('now').textContent === 'step 16 of 16'")
    assert page.locator("[value=step]").is_checked() and page.locator(".canvas .chosen").count() == 0


def test_slider_and_keys_move_all_canvases(page: Any, panels: list[Panel]) -> None:
    for key, step in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert masked_counts(page) == expected(panels, step)
    assert page.locator(".canvas .fresh").count() == 0
    page.locator("#step").fill("2")
    assert masked_counts(page) == expected(panels, 2)
    first = page.locator(".canvas").first
    assert cells_of(first.locator(".fresh")) == (panels[0].trajectory.step[0] == 1).nonzero()[:, 0].tolist()
    assert cells_of(first.locator(".closed")) == list(range(16, 32))
    page.locator("#step").focus()
    page.keyboard.press("End")
    assert masked_counts(page) == [0, 0] and now(page) == "step 16 of 16"
    facts = page.locator("dl").all_inner_texts()
    assert ["16" in facts[0], "✗ not solved" in facts[0], "✓ solved" in facts[1]] == [True] * 3
    assert "32 of 32, done in 5 steps" in facts[1]
    assert [t.strip() for t in page.locator("article pre").all_inner_texts()] == [p.text for p in panels]


def test_play_runs_to_the_end_and_stops(page: Any) -> None:
    page.clock.install()
    page.reload()
    spoken = page.locator("#now, .inspector")
    page.locator("#play").click()
    assert "Pause" in page.locator("#play").inner_text()
    page.clock.run_for(1300)
    assert now(page) == "step 5 of 16"  # 9 s over 16 steps
    assert spoken.evaluate_all("all => all.map(e => e.ariaLive)") == ["off"] * 3  # what plays is not spoken
    page.keyboard.press("Home")  # a hand on the clock stops it
    assert "Play" in page.locator("#play").inner_text()
    assert spoken.evaluate_all("all => all.map(e => e.ariaLive)") == ["polite"] * 3
    page.locator("h1").click()
    page.keyboard.press("Space")
    page.clock.run_for(60_000)
    assert now(page) == "step 16 of 16" and "Play" in page.locator("#play").inner_text()
    page.locator("#play").click()
    assert now(page) == "step 0 of 16"  # from the start again


def rgb(share: float) -> str:
    """The color of a share on the page's scale."""
    stops = ["2e1e3b", "413d7b", "37659e", "348fa7", "40b7ad", "8ad9b1", "d5f2df"]
    low = min(int(share * 6), 5)
    ends = zip(bytes.fromhex(stops[low]), bytes.fromhex(stops[low + 1]), strict=True)
    return f"rgb({','.join(str(math.floor(a + (b - a) * (share * 6 - low) + 0.5)) for a, b in ends)})"


def test_the_switch_changes_the_colors(page: Any, panels: list[Panel]) -> None:
    cells = page.locator(".canvas").first.locator(".cell")

    def colors() -> list[str]:
        return cells.evaluate_all("all => all.map(c => c.style.getPropertyValue('--paint'))")

    by_confidence, step = colors(), panels[0].trajectory.step[0]
    held_now, place = panels[0].candidates[3][1][:, 0].tolist(), 0
    for i, paint in enumerate(by_confidence):
        masked = int(step[i]) >= 3
        assert paint == rgb(held_now[place] if masked else float(panels[0].trajectory.logprob[0, i].exp()))
        place += masked
    page.get_by_text("commit step").click()
    assert colors() == ["" if s >= 3 else rgb(s / 15) for s in step.tolist()]
    assert page.locator("#low").inner_text() == "first step"
    page.keyboard.press("ArrowRight")  # the radio's own key
    assert colors() == by_confidence


def test_a_cell_shows_its_candidates(page: Any, panels: list[Panel]) -> None:
    step = panels[0].trajectory.step[0]
    late, early = int(step.argmax()), int((step == 0).int().argmax())
    cells, card = page.locator(".canvas").first.locator(".cell"), page.locator(".inspector").first

    def rows() -> list[str]:
        return card.locator("li b").evaluate_all("all => all.map(b => b.title.match(/token (\\d+)/)[1])")

    cells.nth(late).hover()
    at = int((step[:late] >= 3).sum())
    assert "masked. Held before step 4:" in card.inner_text()
    assert rows() == list(map(str, panels[0].candidates[3][0][at].tolist()))
    cells.nth(early).hover()
    at = early  # all were masked before the first step
    assert cells.nth(early).evaluate("cell => cell.classList.contains('chosen')")
    assert "committed in step 1 at" in card.inner_text()
    assert rows() == list(map(str, panels[0].candidates[0][0][at].tolist())) and card.locator(".taken").count() == 1
    page.mouse.move(1, 1)
    assert card.inner_text().startswith("Cell 2:")  # the chosen one again
    page.locator(".canvas").nth(1).locator(".cell").nth(7).click()
    assert all(t.startswith("Cell 8:") for t in page.locator(".inspector").all_inner_texts())
    page.keyboard.press("ArrowRight")  # a click leaves the arrows with the steps
    assert now(page) == "step 4 of 16"
    cells.nth(7).focus()
    for key, cell in (("ArrowRight", 9), ("ArrowLeft", 8), ("Home", 1), ("ArrowLeft", 1), ("End", 32)):
        page.keyboard.press(key)
        assert card.inner_text().startswith(f"Cell {cell}:") and now(page) == "step 4 of 16"
    page.keyboard.press("ArrowUp")
    assert int(card.inner_text().split(":")[0].split()[1]) < 32
    page.mouse.move(1, 1)
    page.keyboard.press("Escape")
    assert card.inner_text().startswith("Point at a cell")


def test_the_tab_stop_is_the_chosen_cell(page: Any) -> None:
    stops = page.locator(".cell[tabindex='0']")
    assert cells_of(stops) == [1, 1]  # from the address
    page.locator(".canvas").first.locator(".cell").nth(6).click()
    assert cells_of(stops) == [6, 6]
    page.keyboard.press("Escape")
    assert cells_of(stops) == [0, 0]
    page.evaluate("location.hash = 'step=3&cell=5'")
    page.wait_for_timeout(50)
    page.locator("[value=step]").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.cell") == "4"
    page.wait_for_url("**cell=5")


def test_keys_that_scroll_are_left_alone(page: Any) -> None:
    def scrolls(key: str, place: str) -> bool:
        before = page.evaluate(place)
        page.keyboard.press(key)
        page.wait_for_timeout(300)  # browsers scroll smoothly
        return page.evaluate(place) > before

    page.evaluate("document.body.style.paddingBottom = '3000px'")
    page.locator("h1").click()
    assert scrolls("ArrowDown", "scrollY") and now(page) == "step 3 of 16"
    text = page.locator("article pre").first
    text.evaluate("pre => { pre.textContent = 'line\\n'.repeat(99); pre.focus(); }")
    for key in ("ArrowDown", "Space", "End"):
        assert scrolls(key, "document.querySelector('article pre').scrollTop")
    assert now(page) == "step 3 of 16" and "Play" in page.locator("#play").inner_text()
    page.locator("#prompt pre").focus()  # one line: nothing to scroll
    page.keyboard.press("ArrowRight")
    assert now(page) == "step 4 of 16"
    page.locator("#step").focus()
    page.keyboard.press("ArrowUp")  # the slider's own key
    assert now(page) == "step 5 of 16"


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(file: Path, colors: Any) -> None:
    with open_page(file, 360, 740, fragment="step=2", colors=colors, touch=True) as (page, problems):
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.locator(".canvas .cell").first.tap()
        assert page.locator(".inspector").first.inner_text().startswith("Cell 1:")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"
        assert dark == (colors == "dark") and problems == []
