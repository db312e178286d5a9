"""The page in a real Chromium, from a file, as a reader uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.night.headlines import headlines_of_record
from flows.records.page.content import build_page
from flows.records.page.document import page_html
from flows.records.page.nights import read_night
from infra.artifacts.store import ArtifactStore
from infra.results.store import ResultsStore
from tests.chromium import browser as browser
from tests.flows.records.page.stores import ODD, fill_many, fill_odd

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

expect = pytest.importorskip("playwright.sync_api", reason="pip install playwright").expect

#: a shared machine under load takes long to read five megabytes of script
PATIENCE_MS = 120_000
MANY = 10_000


@dataclass
class Opened:
    """A page in the browser, and what it did that it should not."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """Of the rows on show."""
        return self.page.locator("#board tbody th label").all_inner_texts()

    def heading(self, text: str) -> Any:
        return self.page.locator("#board thead th").filter(has=self.page.get_by_role("button", name=text, exact=True))

    def sort(self, text: str) -> None:
        self.heading(text).get_by_role("button").click()

    def tick(self, *places: int) -> None:
        for place in places:
            self.page.locator(f'#board input[data-place="{place}"]').check()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a small store with everything odd: all of it, and its night."""
    folder = tmp_path_factory.mktemp("pages")
    store = ResultsStore(folder / "results.duckdb")
    fill_odd(store)
    artifacts = ArtifactStore(folder / "store")
    uri = "http://mlflow.example:5000"
    (folder / "all.html").write_text(page_html(build_page(store, artifacts, tracking_uri=uri)), encoding="utf-8")
    row = store.nights("small")[-1]
    lines = headlines_of_record(row, store.night_cells(row.night_id), store.night_figures(row.night_id))
    page = build_page(store, artifacts, tracking_uri=uri, night=read_night(store, row, lines))
    (folder / "night.html").write_text(page_html(page), encoding="utf-8")
    return folder


def open_page(browser: Browser, path: Path, **options: Any) -> Opened:
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    opened = Opened(page)
    page.on("console", lambda said: opened.complaints.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith("file:") else opened.complaints.append(asked.url))
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_selector("html[data-ready]")
    return opened


@pytest.fixture(scope="module")
def shared(browser: Browser, folder: Path) -> Iterator[Opened]:
    opened = open_page(browser, folder / "all.html", viewport={"width": 1400, "height": 900})
    yield opened
    opened.page.context.close()


@pytest.fixture
def opened(shared: Opened) -> Opened:
    """The page of everything, as it was when it was opened."""
    shared.page.evaluate("for (let box; box = document.querySelector('#board input:checked');) box.click()")
    shared.page.get_by_role("button", name="Clear").click()
    expect(shared.page.locator("#count")).to_have_text(re.compile("^All 5"), timeout=PATIENCE_MS)
    return shared


def test_it_renders_without_an_error_or_a_request_and_runs_no_name(opened: Opened) -> None:
    assert opened.names()[0] == "dense"
    assert sorted(opened.names()) == sorted(["dense", "slimgpt-20", "slimgpt-20+lora", ODD, "slimgpt-20"])
    assert opened.page.evaluate("window.hurt") is None
    assert opened.page.locator("#plot .main-svg").count()
    assert opened.page.locator("#tree li").count() == 5
    assert opened.complaints == []


def test_every_column_sorts_and_says_so(opened: Opened) -> None:
    for text in opened.page.locator("#board thead button").all_inner_texts():
        opened.sort(text)
        assert opened.heading(text).get_attribute("aria-sort") in ("ascending", "descending")
    ppl = "wikitext-2-raw-v1 ppl@1024 [1]"
    opened.sort(ppl)
    lowest = [ODD if "script" in name else name for name in opened.names()]
    assert lowest == ["dense", "slimgpt-20", ODD, "slimgpt-20+lora", "slimgpt-20"]
    opened.sort(ppl)
    assert [name for name in opened.names() if "script" in name] == opened.names()[:1]
    assert opened.names()[-2:] == ["slimgpt-20+lora", "slimgpt-20"], "NaN and what is missing come last"
    assert "highest first" in opened.page.locator("#count").inner_text()
    assert opened.page.locator('#board [aria-sort="descending"], #board [aria-sort="ascending"]').count() == 1


def test_filters_leave_what_was_asked_for_and_say_how_many(opened: Opened) -> None:
    page = opened.page

    def chosen(name: str) -> Any:
        return page.get_by_role("combobox", name=name, exact=True)

    page.get_by_label("Search").fill("<SCRIPT> größe")
    assert opened.names() != []
    assert page.locator("#count").inner_text().startswith("4 of 5 checkpoints"), "the run has that name, too"
    page.get_by_label("Search").fill("")
    chosen("Recovery").select_option("lora")
    assert opened.names() == ["slimgpt-20+lora"]
    chosen("Recovery").select_option("all")
    chosen("Sparsity").select_option("20 %")
    chosen("Method").select_option("slimgpt")
    assert len(opened.names()) == 3
    expect(page.locator("#tree li")).to_have_count(4, timeout=PATIENCE_MS)
    page.get_by_label("Search").fill("nobody is called so")
    assert opened.names() == []
    assert page.locator("#count").inner_text().startswith("0 of 5")


def test_two_checkpoints_are_compared(opened: Opened) -> None:
    page = opened.page
    opened.tick(0, 1)
    assert page.locator("#chosen").inner_text() == "2 checkpoints are compared"
    perplexity = page.locator("#metrics tbody tr").filter(has_text="ppl@1024 [1]").locator("td").nth(1)
    assert "worse" in perplexity.inner_text()
    assert "p 0.001" in perplexity.inner_text()
    assert perplexity.get_attribute("title") == "47.5"
    assert page.locator("#metrics tbody tr").filter(has_text="ppl@1024 [1]").locator("td").first.get_attribute(
        "title") == "27.832468013579"  # fmt: skip
    assert "noise" in page.locator("#metrics tbody tr").filter(has_text="piqa acc").inner_text()
    page.locator("input[name=reference]").nth(1).check()
    turned = page.locator("#metrics tbody tr").filter(has_text="ppl@1024 [1]").locator("td").first
    assert "better" in turned.inner_text()
    assert "-19.7" in turned.inner_text()
    opened.tick(3)
    differs = page.locator("#options tr.differs").filter(has_text="steps.0.curve")
    assert differs.locator("td").all_inner_texts() == ["–", "log_increase", "uniform"]
    assert page.locator("#plans tbody tr").nth(1).locator("td").all_inner_texts()[2:4] == ["2 / 3", "12 / 16"]
    assert "are no longer in the store" in page.locator("#untested").inner_text(), "why it was not tested"
    links = page.locator("#metrics thead a").evaluate_all("all => all.map(link => link.href)")
    assert "http://mlflow.example:5000/#/runs/0123abcd" in links
    assert any(link.endswith("/store/checkpoint/key-slimgpt-20/") for link in links)
    assert opened.complaints == []


def test_the_chart_says_and_ticks_what_is_pointed_at(opened: Opened) -> None:
    page = opened.page
    page.locator("#plot").scroll_into_view_if_needed()
    page.locator("#axis-y").select_option("latency ms")
    front = page.locator("#front tbody th").all_inner_texts()
    assert front == ["slimgpt-20"]
    point = page.locator("#plot .scatterlayer .trace").first.locator(".point").first
    point.hover(force=True)
    page.locator("#plot .hovertext").first.wait_for()
    assert "latency ms: 1500 (1500)" in (page.locator("#plot .hovertext").first.text_content() or "")
    box = point.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#board input:checked")).to_have_count(1, timeout=PATIENCE_MS)
    page.locator("#axis-y").select_option("wikitext-2-raw-v1 ppl@1024 [1]")
    assert "3 of the checkpoints have no finite value" in page.locator("#front").inner_text()
    assert opened.complaints == []


def test_a_keyboard_is_enough(browser: Browser, folder: Path) -> None:
    opened = open_page(browser, folder / "all.html", viewport={"width": 1400, "height": 900})
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "table"
    page.keyboard.press("Tab")
    page.keyboard.type("slimgpt-20")
    assert len(opened.names()) == 3
    page.locator("#board thead button").first.focus()
    page.keyboard.press("Enter")
    assert opened.page.locator("#board th").first.get_attribute("aria-sort") == "ascending"
    for _ in range(2):
        page.locator("#board input:not(:checked)").first.focus()
        page.keyboard.press("Space")
        assert page.evaluate("document.activeElement.type") == "checkbox", "the focus stays where it was"
    assert page.locator("#chosen").inner_text() == "2 checkpoints are compared"
    unreachable = page.evaluate(
        "[...document.querySelectorAll('main a, main button, main input, main select, .scroll')].filter(each => "
        "each.tabIndex < 0 || !(each.textContent.trim() || each.labels?.length || each.ariaLabel)).length"
    )
    assert unreachable == 0
    outline = page.evaluate(
        "(document.querySelector('#search').focus(), getComputedStyle(document.activeElement).outlineStyle)"
    )
    assert outline == "solid"
    page.context.close()


#: texts that stand out less than 4.5 to 1 from what is behind them
CONTRAST = """() => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const linear = value => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const [r, g, b, alpha = 1] = numbers(getComputedStyle(node).backgroundColor);
      if (alpha > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const skipped = "#plot, script, style, noscript, .skip, .history-plot, :disabled";
  const hasText = node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
  const texts = [...document.querySelectorAll("body *")].filter(node => !node.closest(skipped) && hasText(node));
  return texts.filter(node => {
    const [low, high] = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 4.5;
  }).map(node => `${node.tagName} ${node.className} ${node.textContent.slice(0, 30)}`);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(browser: Browser, folder: Path, scheme: Any) -> None:
    opened = open_page(browser, folder / "night.html", viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = opened.page
    opened.tick(0, 1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    name = page.locator("#metrics tbody th").first.bounding_box()
    assert name is not None
    assert name["width"] > 100, "names of figures are not broken letter by letter"
    assert page.evaluate(CONTRAST) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page.get_by_role("button", name="Dark").get_attribute("aria-pressed") == str(scheme == "dark").lower()
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    assert page.evaluate(CONTRAST) == []
    lines = page.locator(".headlines li").all_inner_texts()
    assert [line.split(":")[0] for line in lines] == ["Worse", "Failed", "New"]
    assert "worse" in page.locator("#changes tbody tr").first.inner_text()
    assert page.locator("#history-table tbody tr").count() == 3
    assert page.evaluate("window.hurt") is None
    assert opened.complaints == []
    page.context.close()


def test_who_cannot_see_hears_what_there_is(opened: Opened) -> None:
    tree = opened.page.locator("body").aria_snapshot()
    for part in (
        "banner",
        "main",
        "navigation",
        "search",
        'region "Checkpoints"',
        "status: All 5 checkpoints",
        "caption",
    ):
        assert part in tree, part
    unnamed = opened.page.evaluate("[...document.querySelectorAll('table')].filter(each => !each.caption).length")
    assert unnamed == 0


def test_ten_thousand_checkpoints_stay_usable(browser: Browser, tmp_path: Path) -> None:
    store = ResultsStore(tmp_path / "results.duckdb")
    fill_many(store, MANY)
    path = tmp_path / "many.html"
    path.write_text(page_html(build_page(store, ArtifactStore(tmp_path / "store"), tracking_uri="")), encoding="utf-8")
    assert path.stat().st_size < 20e6
    opened = open_page(browser, path, viewport={"width": 1400, "height": 900})
    page = opened.page
    assert page.locator("#board tbody tr").count() == 50
    assert page.locator("#pager").inner_text().split("\n")[2:3] == ["Page 1 of 200"]
    page.locator("#axis-x").select_option("parameters (M)")
    page.locator("#axis-y").select_option("wikitext ppl@1024")
    front = store.select("SELECT checkpoint FROM pareto('size/num_parameters', 'perplexity/wikitext/ppl@1024')").rows
    assert sorted(page.locator("#front tbody th").all_inner_texts()) == sorted(name for (name,) in front)
    script = """text => [0, 1, 2].map(() => {
      const began = performance.now();
      if (text) {
        document.getElementById("search").value = text;
        document.getElementById("search").dispatchEvent(new Event("input"));
      } else document.querySelectorAll("#board thead button")[3].click();
      document.body.offsetHeight;
      return performance.now() - began;
    }).reduce((one, other) => Math.min(one, other))"""
    assert page.evaluate(script, "") < 1000
    assert page.evaluate(script, "flap 5") < 1000
    assert page.evaluate(script, "slimgpt-5") < 1000
    assert page.locator("#count").inner_text().startswith("374 of 10000 checkpoints")
    page.get_by_role("button", name="Next").click()
    assert "Page 2 of 8" in page.locator("#pager").inner_text()
    assert [each for each in opened.complaints if "GPU stall" not in each and "WebGL" not in each] == []
    page.context.close()
