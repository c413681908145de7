"""The page of ``unmask serve`` in a browser: a reader asks, watches the canvas fill, and looks back at it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from browser import open_page
from serving import serving
from unmask.models.masked_lm import MaskedLM


@contextmanager
def started(lm: MaskedLM, seconds: float, **settings: Any) -> Iterator[str]:
    """The address of a server whose passes take so long."""
    slow = lm.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        with serving(lm, max_new_tokens=96, **settings) as (address, _):
            yield f"{address}/"
    finally:
        slow.remove()


@pytest.fixture(scope="module")
def server(tiny_lm: MaskedLM) -> Iterator[str]:
    with started(tiny_lm, 0.03) as address:
        yield address


@pytest.fixture
def page(server: str) -> Iterator[Any]:
    with open_page(server, 1440) as (page, problems):
        page.locator(".canvas .masked").first.wait_for()
        yield page
        assert problems == []


def done(page: Any, state: str = "Done.") -> None:
    page.locator("#state", has_text=state).wait_for(timeout=20_000)


def send(page: Any, text: str = "make 29 from 3 8 5") -> None:
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")


def masked(page: Any) -> int:
    return page.locator(".canvas .masked").count()


def events(*chunks: dict[str, Any]) -> dict[str, Any]:
    """A stream as the server would answer it, for ``route.fulfill``."""
    parts = [json.dumps({"choices": [], **chunk}) for chunk in chunks] + ["[DONE]"]
    return {"content_type": "text/event-stream", "body": "".join(f"data: {part}\n\n" for part in parts)}


def answer(page: Any, *chunks: dict[str, Any]) -> None:
    """From now on every chat gets this stream."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**events(*chunks)))


def started_canvas(length: int, steps: int) -> dict[str, Any]:
    return {"draft": {"index": 0, "canvas": length, "steps": steps, "cells": []}}


def spoken(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **more}]}


def test_a_canvas_fills_and_can_be_scrubbed(page: Any) -> None:
    assert masked(page) == 96 and page.locator("#step").is_disabled()  # what is to come
    send(page)
    page.locator(".canvas .cell:not(.masked)").nth(9).wait_for()
    assert 0 < masked(page) < 96 and page.locator(".canvas .fresh").count() > 0
    assert page.locator("#step").is_disabled() and page.locator("#send").is_hidden()
    done(page)
    facts = page.locator("article dl").inner_text()
    assert "48" in facts and "96 of 96, done in 48 steps" in facts and masked(page) == 0
    text = page.locator("article pre").inner_text()
    assert text and page.locator("#turns .assistant p").inner_text() == text
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert masked(page) == 96 and page.locator("#now").inner_text() == "step 0 of 48"
    page.keyboard.press("ArrowRight")
    assert masked(page) == 94 and page.locator(".canvas .fresh").count() == 2
    assert page.locator(".canvas .closed").count() == 64
    page.get_by_label("confidence").check(force=True)
    assert page.locator("[value=confidence]").is_checked() and page.locator("#high").inner_text() == "100 %"


def test_candidates_are_asked_for_once(page: Any) -> None:
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request) if "candidates" in request.url else None)
    send(page)
    done(page)
    cells, card = page.locator(".canvas .cell"), page.locator(".inspector")
    cells.nth(3).hover()
    card.locator("li").nth(4).wait_for()
    assert card.locator("li").count() == 5 and card.locator(".taken").count() == 1
    assert "committed in step" in card.inner_text() and len(asked) == 1
    before = json.loads(asked[0].post_data)["before"]
    cells.nth(3).click()
    page.locator("#step").fill(str(before))
    assert "masked. Held before step" in card.inner_text() and card.locator("li").count() == 5
    page.mouse.move(1, 1)
    page.locator("#step").fill("48")
    assert card.locator(".taken").count() == 1 and len(asked) == 1


def test_two_decoders_side_by_side(page: Any) -> None:
    asked: list[Any] = []
    page.on("request", lambda r: asked.append(json.loads(r.post_data)) if "/v1/" in r.url else None)
    page.get_by_text("Compare with a second decoder").click()
    page.locator(".decoder select").nth(1).select_option("eoser-ass")
    page.locator(".decoder input").nth(1).fill("blocks=2, gamma_min=0.1")
    page.locator("#seed").fill("7")
    send(page)
    done(page)
    first, second = sorted(asked, key=lambda body: len(body.pop("decoder")))
    assert first == second and first["seed"] == 7 and first["max_tokens"] == 96
    assert page.locator("article h2").all_inner_texts() == ["semi-ar", "eoser-ass:blocks=2,gamma_min=0.1"]
    boxes = [canvas.bounding_box() for canvas in page.locator(".canvas").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    texts = page.locator("article pre").all_inner_texts()
    shown = page.locator("#turns .assistant p")
    assert shown.inner_text() == texts[0] != texts[1]
    page.get_by_text("Continue with this answer").click()
    assert shown.inner_text() == texts[1]
    send(page, "and now 7")
    page.locator(".canvas .fresh").first.wait_for()
    assert [m["content"] for m in asked[-1]["messages"]] == ["make 29 from 3 8 5", texts[1], "and now 7"]
    done(page)
    page.get_by_label("Remove this decoder").first.click()
    assert page.locator(".decoder").count() == 1 and page.locator("#compare").is_visible()


def test_a_conversation_has_turns(page: Any) -> None:
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append((r.url, json.loads(r.post_data))) if "/v1/" in r.url else None)
    for text in ("make 5 from 1 2 2", "x"):
        send(page, text)
        done(page)
        page.locator("#state").evaluate("e => e.textContent = ''")
    roles = [message["role"] for message in bodies[1][1]["messages"]]
    assert roles == ["user", "assistant", "user"] and page.locator("#turns li").count() == 4
    page.get_by_text("New conversation").click()
    assert page.locator("#turns li").count() == 0 and masked(page) == 96
    page.get_by_text("Completion", exact=True).click()
    send(page, "The capital")
    done(page)
    assert bodies[2][0].endswith("/v1/completions")
    assert bodies[2][1]["prompt"] == "The capital" and "messages" not in bodies[2][1]


def test_stop_keeps_what_is_there(page: Any) -> None:
    send(page)
    page.locator(".canvas .cell:not(.masked)").nth(9).wait_for()
    page.get_by_text("Stop", exact=True).click()
    done(page, "Stopped.")
    left = masked(page)
    page.wait_for_timeout(300)
    assert "stopped after" in page.locator("article dl").inner_text()
    assert 0 < masked(page) == left and page.locator("#send").is_visible()
    page.locator("#step").fill("0")
    assert masked(page) == 96
    page.get_by_text("New conversation").click()
    send(page)
    page.locator(".canvas .fresh").first.wait_for()
    page.get_by_text("New conversation").click()  # stops as well
    page.wait_for_timeout(300)
    assert masked(page) == 96 and page.locator("#state").inner_text() == "" and page.locator("#turns li").count() == 0


def test_an_example_is_graded(page: Any) -> None:
    page.locator("#examples button").first.click()
    page.locator("dd", has_text="solved").wait_for(timeout=20_000)
    assert page.locator("article dt").nth(3).inner_text() == "graded"
    assert page.locator("#turns .assistant p").inner_text().startswith("<reasoning>")
    send(page, "why?")  # nobody knows what is right here
    page.locator(".canvas .fresh").first.wait_for()
    assert page.get_by_text("graded", exact=True).count() == 0
    done(page)


def test_a_pointer_that_is_there_before_the_canvas_asks_for_no_candidates_of_no_step(page: Any) -> None:
    page.locator(".canvas .cell").nth(5).hover()
    send(page)
    page.locator(".canvas .fresh").first.wait_for()
    page.locator(".canvas .cell").nth(6).hover()
    done(page)  # a refused request would be a problem of the page


def test_the_decode_is_saved(page: Any) -> None:
    assert page.locator("#save").is_disabled()
    send(page)
    done(page)
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "decode.html"
    assert Path(download.value.path()).read_text().lower().startswith("<!doctype html>")


def test_nothing_moves_while_it_fills(page: Any) -> None:
    def boxes() -> list[Any]:
        parts = ".canvas, article pre, .inspector, article dl, #turns, #box, #decoders, .clock, .colors"
        return [part.bounding_box() for part in page.locator(parts).all()]

    def offsets() -> list[int]:
        return page.locator(".canvas .cell").evaluate_all("all => all.map(c => 10_000 * c.offsetTop + c.offsetLeft)")

    page.locator("#examples button").first.click()
    page.locator(".canvas .fresh").first.wait_for()
    before, cells = boxes(), offsets()
    while page.locator("#stop").is_visible():
        assert boxes() == before
        time.sleep(0.1)
    page.locator("dd", has_text="solved").wait_for(timeout=20_000)
    assert boxes() == before and offsets() == cells


def test_errors_are_one_sentence(server: str) -> None:
    with open_page(server) as (page, problems):
        page.locator(".decoder input").fill("stepz=3")
        send(page, "hello")
        alert = page.get_by_role("alert")
        alert.filter(has_text="stepz").wait_for()
        assert "\n" not in alert.inner_text()
        assert page.locator("#text").input_value() == "hello" and page.locator("#turns li").count() == 0
        page.locator(".decoder input").fill("")
        answer(page, started_canvas(96, 4), {"error": {"message": "the model ran out of <b>memory</b>"}})
        page.locator("#text").press("Enter")
        alert.filter(has_text="the model ran out of <b>memory</b>").wait_for()
        page.locator("#length").fill("0")
        page.locator("#text").press("Enter")  # the field says so itself
        assert page.evaluate("document.activeElement.id") == "length"
        assert all("status of 400" in problem for problem in problems)


def test_a_key_is_asked_for(toy_lm: MaskedLM) -> None:
    with started(toy_lm, 0, api_key="secret") as address, open_page(address) as (page, problems):
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        page.locator(".canvas .masked").first.wait_for()
        send(page)
        done(page)
        page.reload()
        page.locator(".canvas .masked").first.wait_for()  # the key is kept
        assert page.locator("#key").is_hidden() and all("status of 401" in problem for problem in problems)


HOSTILE = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "\u202eright to left", "&amp;", "a\nb"]


def test_hostile_texts_are_texts(page: Any) -> None:
    cells = [[i, i, text, -0.5] for i, text in enumerate(HOSTILE)]
    draft = {"index": 0, "step": 0, "cells": cells, "horizon": 5}
    answer(page, started_canvas(5, 1), {"draft": draft}, *map(spoken, HOSTILE))
    found = {"cells": {"1": [[7, text, 0.2] for text in HOSTILE]}}
    page.route("**/unmask/candidates", lambda route: route.fulfill(json=found))
    send(page, HOSTILE[0])
    done(page)
    assert page.locator(".canvas .cell span").all_text_contents() == HOSTILE
    assert page.locator(".canvas .cell").nth(2).get_attribute("title") == HOSTILE[2]
    assert page.locator("article pre").text_content() == "".join(HOSTILE)
    assert page.locator("#turns p").all_text_contents() == [HOSTILE[0], "".join(HOSTILE)]
    page.locator(".canvas .cell").nth(1).hover()
    page.locator(".inspector li").nth(4).wait_for()
    assert page.locator(".inspector li b").all_text_contents() == HOSTILE
    assert page.locator("img").count() == 0 and page.locator("body script").count() == 0


def test_a_template_keeps_what_was_given(page: Any) -> None:
    given = {"index": 0, "canvas": 4, "steps": 2, "cells": [[0, 9, "The", None], [3, 8, "end", None]]}
    steps = [{"index": 0, "step": s, "cells": [[2 - s, 5, "x", -0.1]], "horizon": 4} for s in range(2)]
    answer(page, {"draft": given}, *({"draft": step} for step in steps), spoken("The x x end", nfe=2))
    send(page)
    done(page)
    assert page.locator(".canvas .cell").all_text_contents() == ["The", "x", "x", "end"]
    assert "2 of 2" in page.locator("article dl").inner_text()
    page.locator("#step").fill("0")
    assert masked(page) == 2 and page.locator(".canvas .fixed").count() == 2
    page.locator(".canvas .fixed").first.click()
    assert "Cell 1: The given" in page.locator(".inspector").inner_text()


def test_ten_thousand_cells_are_drawn_in_seconds(page: Any) -> None:
    cells = [[i, i, f"w{i}", -0.1] for i in range(10_000)]
    steps = [{"index": 0, "step": s, "cells": cells[100 * s :][:100], "horizon": 10_000} for s in range(100)]
    answer(page, started_canvas(10_000, 100), *({"draft": step} for step in steps), spoken("words", nfe=100))
    start = time.monotonic()
    send(page)
    done(page)
    assert page.locator(".canvas .cell:not(.masked)").count() == 10_000
    page.locator("#step").fill("50")
    assert masked(page) == 5000
    assert time.monotonic() - start < 10  # two slow cores: 2 to 3 s


def test_the_keyboard_is_enough(page: Any) -> None:
    page.locator("#text").focus()
    page.keyboard.type("make 5")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("from 1 2 2")
    assert page.locator("#text").input_value() == "make 5\nfrom 1 2 2"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    assert page.locator("#send").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator(".canvas .fresh").first.wait_for()
    assert page.evaluate("document.activeElement.id") == "stop"
    assert page.locator("#now").get_attribute("aria-live") == "off"  # not every step is spoken
    page.keyboard.press("Enter")
    done(page, "Stopped.")
    assert page.evaluate("document.activeElement.id") == "text"
    assert page.locator("#now").get_attribute("aria-live") == "polite"
    unnamed = "all => all.filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map(e => e.outerHTML)"
    assert page.locator("input, select, textarea, button").evaluate_all(unnamed) == []
    page.locator(".canvas .cell").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.cell") == "1"


def test_parameters_are_explained(page: Any) -> None:
    about, parameters = page.locator(".decoder p"), page.locator(".decoder input")
    assert about.inner_text() == "Sets block_length=32"
    page.get_by_text("All parameters of a decoder").click()
    page.locator("#fields").get_by_text("steps", exact=True).click()
    assert parameters.input_value() == "steps=" and about.inner_text().startswith("steps: ")
    page.keyboard.type("12")
    send(page)
    done(page)
    assert page.locator("h2").inner_text() == "semi-ar:steps=12"
    assert "done in 12 steps" in page.locator("article dl").inner_text()


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(server: str, colors: Any) -> None:
    with open_page(server, 390, 844, colors=colors, touch=True) as (page, problems):
        page.locator("#examples button").first.tap()
        page.locator(".canvas .fresh").first.wait_for()
        assert page.locator(".canvas").evaluate("e => e.getBoundingClientRect().top < innerHeight")
        page.locator("dd", has_text="solved").wait_for(timeout=20_000)
        page.locator(".canvas .cell").nth(5).tap()
        page.locator(".inspector li").nth(4).wait_for()
        page.locator("#settings summary").first.tap()
        page.locator("#compare").tap()
        page.locator("#fields").evaluate("e => e.parentElement.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 26)"
        assert dark == (colors == "dark") and problems == []
