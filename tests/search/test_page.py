"""The page in a real browser: Debian's Chromium, driven by playwright, offline."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.search.page_index import HOSTILE, FakeIndex, Served, brightness

playwright = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH (Debian: apt install chromium)"
)

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
WAIT = 20_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    sandbox = os.geteuid() != 0  # it refuses to run as root with one
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=sandbox)
        yield browser
        browser.close()


class Visit:
    """One page, and what went wrong on it.

    Attributes:
        faults: messages of its console, errors of its code and requests to other hosts.
    """

    def __init__(self, browser, served: Served, **context: object) -> None:
        self.context = browser.new_context(viewport=DESKTOP, **context)
        self.context.set_default_timeout(WAIT)
        self.served = served
        self.faults: list[str] = []
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append(dialog.message))
        self.page.on("request", self._hear)

    def _hear(self, request) -> None:
        if not request.url.startswith((self.served.url, "data:")):
            self.faults.append(request.url)

    def search(self, query: str) -> None:
        self.page.fill("#query", query)
        self.enter(query)

    def enter(self, query: str) -> None:
        """Of what the field holds, until its answer is there."""
        self.page.keyboard.press("Enter")
        searched = re.sub(r"\s+", " ", query)
        self.wait(f"wanted.q === {json.dumps(searched)} && results.ariaBusy === 'false'")

    def expect(self, message: str) -> None:
        """Of a fault that the test brings about; the console may tell it late."""
        self.faults[:] = [fault for fault in self.faults if not re.search(message, fault)]

    def card(self, name: str):
        return self.page.locator(".card", has=self.page.get_by_title(name, exact=True)).first

    def state(self) -> dict:
        """Of the open player."""
        return self.page.evaluate(
            "({time: player.time, paused: player.screen.paused, clips: player.clips,"
            " count: document.querySelectorAll('video').length})"
        )

    def wait(self, condition: str) -> None:
        """playwright's own would need `unsafe-eval` of the page."""
        end = time.monotonic() + WAIT / 1000
        while not self.page.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never: {condition}"
            self.page.wait_for_timeout(30)

    def seen(self) -> float:
        """Mean brightness of the picture that the player shows."""
        return self.page.evaluate(
            """() => { const c = document.createElement("canvas"); c.width = c.height = 8;
            const g = c.getContext("2d"); g.drawImage(player.screen, 0, 0, 8, 8);
            return g.getImageData(0, 0, 8, 8).data.filter((_, i) => i % 4 === 1)
            .reduce((sum, x) => sum + x) / 64; }"""
        )


@pytest.fixture
def visit(browser, served: Served) -> Iterator[Visit]:
    visit = Visit(browser, served)
    visit.page.goto(served.url)
    yield visit
    visit.context.close()
    assert not visit.faults


STARTED = (
    "player && player.asked === null && !player.screen.seeking && player.screen.readyState > 1"
)
ENDED = f"{STARTED} && player.until === null && player.screen.paused"


def test_type_enter_and_the_first_card_plays_its_moment(visit: Visit) -> None:
    page = visit.page
    page.keyboard.type("a red door")  # the field has the focus
    visit.enter("a red door")
    first = page.locator(".card").first
    assert first.locator(".name").text_content() == "red door.mp4"
    assert first.locator(".when").text_content() == "0:05.0 – 0:07.5"
    assert first.locator(".score").text_content() == "0.310"
    visit.wait("document.querySelector('.card img').naturalWidth > 0")
    assert "moments" in page.locator("#summary").text_content()

    first.locator(".hit").click()
    visit.wait(STARTED)
    state = visit.state()
    assert 5.0 <= state["time"] < 7.6 and not state["clips"]
    visit.wait(ENDED)
    state = visit.state()
    assert abs(state["time"] - 7.5) < 0.5 and state["paused"] and state["count"] == 1
    assert abs(visit.seen() - brightness(7)) < 6

    # playing on by its own button, it goes on past the moment
    page.evaluate("player.screen.play()")
    visit.wait("player.time > 7.9")

    address = page.url
    assert re.search(r"\?q=a\+red\+door&v=v0&t=5\.00$", address)
    page.goto(address)
    visit.wait(STARTED)
    assert page.locator(".card.open .title").text_content() == "red door.mp4"
    assert 4.99 <= visit.state()["time"] <= 7.6


def test_the_bar_shows_every_event_and_seeks(visit: Visit, index: FakeIndex) -> None:
    visit.search("red door")
    visit.page.locator(".hit").first.click()
    bar = visit.page.locator(".bar")
    visit.page.wait_for_selector(".bar[data-events]")
    assert int(bar.get_attribute("data-events")) == len(index.timeline("red door", "v0"))
    assert bar.locator(".steps").get_attribute("d").count("M") == 63
    box = bar.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 30)
    best = max(m.score for m in index.timeline("red door", "v0") if m.start <= 6.0 < m.end)
    assert bar.locator(".tip").text_content() == f"0:06 · {best:.3f}"
    visit.page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + 30)
    visit.wait(f"{STARTED} && player.time < 4.5")
    assert abs(visit.state()["time"] - 3.0) < 0.9
    assert abs(visit.seen() - brightness(visit.state()["time"])) < 18
    assert bar.get_attribute("role") == "slider"
    bar.focus()
    visit.page.keyboard.press("End")
    visit.wait("player.time > 10.5")


@pytest.mark.parametrize("name", ["holiday/old camera.avi", "holiday/new phone.mp4"])
def test_what_the_browser_cannot_play_comes_as_a_clip(
    visit: Visit, index: FakeIndex, name: str
) -> None:
    start, end = index.shows[name]
    visit.search(name)
    visit.card(name).locator(".hit").click()
    visit.wait(ENDED)
    state = visit.state()
    assert state["clips"] and abs(state["time"] - end) < 0.5
    visit.page.evaluate(f"player.screen.currentTime = {start} + 0.5 - player.offset")
    visit.wait("!player.screen.seeking")
    assert abs(visit.seen() - brightness(start + 0.5)) < 6
    box = visit.page.locator(".bar").bounding_box()
    visit.page.mouse.click(box["x"] + box["width"] * 0.79, box["y"] + 30)  # outside of the clip
    visit.wait(f"{STARTED} && player.time > 9")
    assert abs(visit.state()["time"] - 9.48) < 1
    assert visit.page.locator(".note").is_hidden()


def test_keyboard_alone(visit: Visit) -> None:
    keys, page = visit.page.keyboard, visit.page
    focused = "document.activeElement.closest('.card')?.querySelector('.name').title"
    page.evaluate("document.activeElement.blur()")
    keys.press("/")
    keys.type("red/door")
    visit.enter("red/door")
    assert page.input_value("#query") == "red/door"
    titles = page.locator(".card .name").evaluate_all("all => all.map(name => name.title)")
    keys.press("ArrowDown")
    assert page.evaluate(focused) == titles[0]
    keys.press("ArrowRight")
    assert page.evaluate(focused) == titles[1]
    keys.press("ArrowDown")
    assert page.evaluate(focused) == titles[5]  # four in a row
    keys.press("ArrowUp")
    keys.press("ArrowLeft")
    keys.press("Enter")
    visit.wait(f"{STARTED} && !player.screen.paused")
    keys.press("Space")
    visit.wait("player.screen.paused")
    keys.press("Space")
    visit.wait("!player.screen.paused")
    visit.wait(ENDED)
    keys.press("Enter")  # once more
    visit.wait(f"{STARTED} && !player.screen.paused && player.time < 7")
    keys.press("Escape")
    assert page.locator("video").count() == 0
    assert page.evaluate(focused) == titles[0] and "v=" not in page.url
    keys.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "query"
    keys.press("Escape")
    assert page.input_value("#query") == ""


def test_moments_or_videos_folders_and_the_way_back(visit: Visit) -> None:
    page, names = visit.page, visit.page.locator(".card .name")
    visit.search("boat")
    moments = names.count()
    page.get_by_label("Videos").check()
    visit.wait(f"document.querySelectorAll('.card .name').length < {moments}")
    assert names.count() == 7 and names.first.text_content() == "boat.webm"
    page.locator(".hit").first.click()
    visit.wait(ENDED)
    others = page.locator(".moments button")
    assert others.all_inner_texts() == ["0:02.0 – 0:04.0\n0.309", "0:00.0 – 0:01.5\n0.259"]
    others.nth(1).click()
    visit.wait(f"{STARTED} && player.time < 1.6")
    assert others.nth(1).get_attribute("aria-current") == "true"
    page.select_option("#folder", "holiday")
    visit.wait("document.querySelectorAll('.card .name').length === 3")
    assert set(page.locator(".folder").all_text_contents()) == {"holiday"}
    assert "by=videos" in page.url and "in=holiday" in page.url
    page.reload()
    visit.wait("document.querySelectorAll('.card .name').length === 3")
    assert page.input_value("#folder") == "holiday"
    page.go_back()
    visit.wait("document.querySelectorAll('.card .name').length === 7")
    page.go_back()
    visit.wait(f"document.querySelectorAll('.card .name').length === {moments}")
    page.go_back()
    page.wait_for_selector("body.home #welcome:not([hidden])")


def test_on_a_phone(browser, served: Served) -> None:
    phone = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2}
    visit = Visit(browser, served, **phone)
    page = visit.page
    page.set_viewport_size(PHONE)
    fits = "document.documentElement.scrollWidth <= 390"
    page.goto(served.url)
    assert page.evaluate(fits)
    visit.search("red door")
    assert page.evaluate(fits)
    assert page.locator(".card").first.bounding_box()["width"] > 340
    page.locator(".hit").first.tap()
    visit.wait(STARTED)
    page.wait_for_selector(".bar[data-events]")
    assert page.evaluate(fits)
    video = page.locator("video").bounding_box()
    assert video["width"] == 390 and video["height"] < 300
    small = "button, select, .switch input"
    heights = page.locator(small).evaluate_all(
        "all => all.filter(e => e.offsetParent && !e.matches('.link')).map(e => e.offsetHeight)"
    )
    assert min(heights) >= 36
    page.locator(".close").tap()
    assert page.locator("video").count() == 0
    visit.context.close()
    assert not visit.faults


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (color) => rgb(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { while (e && rgb(getComputedStyle(e).backgroundColor)[3] < 200)
    e = e.parentElement; return e ? getComputedStyle(e).backgroundColor : "white"; };
  const found = {};
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !e.checkVisibility() || e.closest("script, .stage, select")) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    found[e.className || e.tagName] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(browser, served: Served, scheme: str) -> None:
    visit = Visit(browser, served, color_scheme=scheme, reduced_motion="reduce")
    visit.page.goto(served.url)
    visit.page.wait_for_selector(".tries:not([hidden])")
    welcome = visit.page.evaluate(CONTRASTS)
    visit.search("red door")
    visit.page.locator(".hit").first.click()
    visit.page.wait_for_selector(".bar[data-events]")
    visit.page.locator(".bar").hover()
    opened = visit.page.evaluate(CONTRASTS)
    for contrasts in (welcome, opened):
        assert len(contrasts) > 5 and min(contrasts.values()) >= 4.5, contrasts
    page = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", page))) / 3
    assert brightness > 200 if scheme == "light" else brightness < 50
    motion = "document.getAnimations().length"
    assert visit.page.evaluate(motion) == 0
    visit.context.close()
    assert not visit.faults


def test_names_and_queries_are_only_ever_text(visit: Visit) -> None:
    page = visit.page
    for query in (HOSTILE, "<script>document.title='gotcha'</script>", '"><svg onload=alert(1)>'):
        visit.search(query)
        assert page.title() == f"{query} · Search videos"
        assert page.input_value("#query") == query
    visit.search(HOSTILE)
    found = visit.card(HOSTILE)
    assert found.locator(".name").text_content() == HOSTILE
    found.locator(".hit").click()
    visit.wait(STARTED)
    assert page.locator(".open h2").text_content() == HOSTILE
    page.reload()
    visit.wait(STARTED)
    assert page.locator("main img[src='x'], header img, main script").count() == 0
    assert "gotcha" not in page.title() or HOSTILE in page.title()


def test_a_removed_video_is_a_grey_card(visit: Visit, index: FakeIndex) -> None:
    index.put("holiday/fleeting.mp4", 12.0, 1.0, 3.0)
    Path(index.known["v7"].path).write_bytes(Path(index.known["v0"].path).read_bytes())
    visit.search("lost")
    lost = visit.card("lost.mp4")
    assert "gone" in lost.get_attribute("class")
    assert lost.locator(".why").text_content() == "No longer there"
    lost.locator(".hit").dispatch_event("click")
    assert visit.page.locator("video").count() == 0
    visit.search("fleeting")
    Path(index.known["v7"].path).unlink()
    visit.card("holiday/fleeting.mp4").locator(".hit").click()
    visit.page.wait_for_selector(".card.gone [title='holiday/fleeting.mp4']")
    assert visit.page.locator("video").count() == 0
    visit.page.wait_for_load_state("networkidle")  # thumbnails of it, too
    visit.expect("status of 404")


def test_states_between(visit: Visit, index: FakeIndex) -> None:
    page = visit.page
    page.wait_for_selector("#holdings:has-text('7 videos, 1 minute')")
    page.locator(".tries button").first.click()
    page.wait_for_selector(".card .hit")
    index.delay = 1.0
    visit.page.fill("#query", "slow")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results[inert][aria-busy=true]")
    index.delay = 0.0
    page.wait_for_selector("#results:not([inert])[aria-busy=false]")
    visit.search("nothing")
    page.wait_for_selector("#message h2:has-text('Nothing found')")
    visit.search("refuse")
    page.wait_for_selector("#message p:has-text('give --rebuild')")
    visit.search("fail")
    page.wait_for_selector("#message p:has-text('its log says why')")
    assert page.locator("#message button").is_visible() and page.locator(".card").count() == 0
    visit.expect("status of (400|500)")


def test_an_indexer_at_work_is_seen(browser, index: FakeIndex, served: Served) -> None:
    index.indexing = {"done": 3, "total": 12, "name": HOSTILE}
    visit = Visit(browser, served)
    visit.page.goto(served.url)
    line = visit.page.locator("#indexing")
    line.wait_for()
    assert line.locator("span").text_content() == f"Indexing 3 of 12: {HOSTILE}"
    assert line.locator("progress").evaluate("p => p.value") == 0.25
    visit.search("red door")
    index.version, index.indexing = 2, None
    line.get_by_text("The index has changed.").wait_for()
    line.get_by_role("button").click()
    visit.wait("version === 2")
    visit.context.close()
    assert not visit.faults


def test_with_a_token(browser, index: FakeIndex) -> None:
    from utils.search.server import make_app

    with Served(make_app(index, "0123456789abcdef")) as served:
        visit = Visit(browser, served)
        assert visit.page.goto(f"{served.url}/?token=wrong").status == 401
        visit.page.goto(f"{served.url}/?q=red+door&token=0123456789abcdef")
        visit.page.wait_for_selector(".card .hit")
        assert "token" not in visit.page.url
        visit.page.locator(".hit").first.click()
        visit.wait(STARTED)
        visit.context.close()
    visit.expect("status of 401")
    assert not visit.faults
