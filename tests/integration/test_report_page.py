# SPDX-License-Identifier: Apache-2.0
"""The page of the report in a real browser: Debian's chromium, through playwright."""

import json
import os
import shutil

import pytest
from support.report_logs import DEMO, changed, demo_events, write_events

from mxresnet.results.report import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (.ci/run installs it as root)"
)
SIZES = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1440, 900)}
HOSTILE = "</script><script>document.title='x'</script><b>bold</b><br>$x^2$ %{x} {{7*7}}"


def step_times(epoch):
    value = {
        "p50_ms": [100.0, 101.0, 99.0, 130.0, 100.0, 100.0, 98.0, 100.0],
        "p99_ms": [120.0] * 8,
        "max_ms": [150.0] * 8,
        "input_wait_seconds": [2.0] * 8,
    }
    return {"time_ms": 1, "key": "step_times", "value": value, "metadata": {"epoch_num": epoch}}


class Tab:
    """A tab of the browser with a report; errors and requests are collected."""

    def __init__(self, browser, path):
        self.page = browser.new_page(viewport={"width": 1440, "height": 900})
        self.problems, self.requests = [], []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"file://{path}")
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)
        self.data = json.loads(self.page.inner_text("#content") or self._text("content"))

    def _text(self, name):
        return self.page.evaluate(f"document.getElementById('{name}').textContent")

    def traces(self, name):
        """Return the data that plotly has drawn in a chart."""
        script = (
            "name => document.getElementById('plot-' + name).data.map(t => "
            "({name: t.name, x: Array.from(t.x), y: Array.from(t.y)}))"
        )
        return self.page.evaluate(script, name)

    def show(self, size, scheme):
        """Change the size of the window and the color scheme, and wait until all is redrawn."""
        width, height = SIZES[size]
        self.page.emulate_media(color_scheme=scheme)
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('.plot')].every(one => "
            "Math.abs(one.querySelector('.main-svg').getBoundingClientRect().width - "
            "one.clientWidth) < 2)",
            timeout=60_000,
        )


@pytest.fixture(scope="module")
def browser():
    playwright_api = pytest.importorskip("playwright.sync_api")
    with playwright_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture(scope="module")
def demo(browser, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["--demo", "-o", str(path)]) == 0
    return Tab(browser, path)


@pytest.fixture(scope="module")
def hostile(browser, tmp_path_factory):
    """A report on two series whose values and names are HTML, with step times of ranks."""
    folder = tmp_path_factory.mktemp("<i>hostile")
    events = [*demo_events(), step_times(1), step_times(2)]
    for key in ("submission_org", "submission_platform", "s_network", "seed", "opt_name"):
        events = changed(events, key, value=HOSTILE)
    log = write_events(folder / "<img src=x onerror=alert(1)>.log", events)
    main([str(DEMO), str(log), "-o", str(folder / "report.html")])
    return Tab(browser, folder / "report.html")


LAYOUT = """() => {
  const problems = [];
  const rect = (one) => one.getBoundingClientRect();
  const shown = (box) => box.width > 0 && box.height > 0;
  if (document.documentElement.scrollWidth > innerWidth) problems.push("page is too wide");
  for (const plot of document.querySelectorAll(".plot")) {
    const outer = rect(plot);
    const texts = [...plot.querySelectorAll("svg text")].map(one => [one.textContent, rect(one)])
      .filter(([, box]) => shown(box));
    for (const [text, box] of texts) {
      if (box.left < outer.left - 1 || box.right > outer.right + 1 ||
          box.top < outer.top - 1 || box.bottom > outer.bottom + 1)
        problems.push(`${plot.id}: "${text}" is cut`);
    }
    texts.forEach(([a, one], i) => texts.slice(i + 1).forEach(([b, other]) => {
      if (one.left < other.right - 1 && other.left < one.right - 1 &&
          one.top < other.bottom - 2 && other.top < one.bottom - 2)
        problems.push(`${plot.id}: "${a}" and "${b}" overlap`);
    }));
  }
  const blocks = document.querySelectorAll(
    "h1, h2, h3, p, dt, dd, .chip, .legend li, .plot, td, th, summary");
  for (const one of blocks) {
    const box = rect(one);
    if (!shown(box) || one.closest(".scroll")) continue;
    if (box.right > innerWidth + 1 || box.left < -1)
      problems.push(`outside: ${one.textContent.slice(0, 40)}`);
    if (one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== "inline" &&
        !one.classList.contains("plot"))
      problems.push(`cut: ${one.tagName} ${one.textContent.slice(0, 40)}`);
  }
  const columns = [...document.querySelectorAll("section > *, .grid > *")].map(rect).filter(shown);
  columns.forEach((one, i) => columns.slice(i + 1).forEach((other) => {
    const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 &&
      a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
    if (one.left < other.right - 1 && other.left < one.right - 1 && one.top < other.bottom - 1 &&
        other.top < one.bottom - 1 && !inside(one, other) && !inside(other, one))
      problems.push("two blocks overlap");
  }));
  return problems;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["demo", "hostile"])
def test_nothing_overlaps_or_is_cut(request, name, size, scheme):
    tab = request.getfixturevalue(name)
    tab.show(size, scheme)
    assert tab.page.evaluate(LAYOUT) == []
    background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 18, 21)") == (scheme == "dark")
    assert tab.problems == []


def test_no_request_leaves_the_page(demo, hostile):
    for tab in (demo, hostile):
        assert all(url.startswith(("file:", "data:", "blob:")) for url in tab.requests)
        assert sum(url.startswith("file:") for url in tab.requests) == 1


def test_every_number_in_a_chart_is_in_the_json(demo):
    (series,) = demo.data["series"]
    runs, published = series["runs"], series["published_images_per_second_each"]
    accuracy = demo.traces("accuracy-0")
    band = [point for point in series["band"] if point["runs"] >= 3]
    assert accuracy[0]["y"] == [point["high"] for point in band]
    assert accuracy[1]["y"] == [point["low"] for point in band]
    for trace, run in zip(accuracy[2:], runs):
        assert trace["x"] == [one["epoch"] for one in run["evaluations"]]
        assert trace["y"] == [one["accuracy"] for one in run["evaluations"]]
    speed = demo.traces("throughput-0")
    assert [speed[0]["y"][0], speed[1]["y"][0]] == [published["max"], published["min"]]
    for trace, run in zip(speed[2:], runs):
        expected = [one["images_per_second"] / 8 for one in run["epochs"]]
        assert trace["y"] == pytest.approx(expected, rel=1e-12)
    for trace, part in zip(demo.traces("time-0"), ("init_to_run_start", "train", "eval", "other")):
        expected = [run["seconds"][part] / 60 for run in runs]
        assert trace["x"] == pytest.approx(expected, rel=1e-12)
    systems = demo.data["published"]["systems"]
    points = {(one["accelerators"], one["score_minutes"]) for one in systems}
    *others, own = demo.traces("scaling")
    drawn = [point for trace in others for point in zip(trace["x"], trace["y"])]
    assert set(drawn) <= points and len(drawn) == 40  # one has no accelerators
    assert (own["x"], own["y"]) == ([8], [series["minutes"]])
    reference = series["official"]["reference"]
    convergence = demo.traces("convergence-0")
    assert convergence[0]["y"] == [one["mean_epochs"] for one in reference["points"]]
    assert convergence[1]["y"] == [one["min_epochs"] for one in reference["points"]]
    reached = [run for run in runs if run["outcome"] == "reached"]
    assert convergence[-1]["y"] == [run["epochs_run"] for run in reached]


def test_the_step_times_of_ranks_are_drawn(hostile):
    medians = hostile.traces("ranks-1")[0]
    assert medians["x"][0] == "3" and medians["y"][0] == 130.0


def test_hostile_values_are_shown_as_text(hostile):
    page = hostile.page
    assert page.title() != "x" and hostile.problems == []
    assert page.locator("img, main b, main i").count() == 0
    assert HOSTILE in page.inner_text("section >> nth=1")
    names = page.evaluate(
        "[...document.querySelectorAll('.plot text')].map(one => one.textContent)"
    )
    assert any("<img src=x" in name for name in names)


def test_charts_have_text_alternatives(demo):
    labels = demo.page.evaluate(
        "[...document.querySelectorAll('.plot')].map(one => one.getAttribute('aria-label'))"
    )
    assert len(labels) == 5 and all(len(label) > 40 for label in labels)
    assert demo.page.locator("figure details table").count() == 5


def test_the_verdict_is_at_the_top(demo):
    demo.show("phone", "light")
    box = demo.page.locator("h1").bounding_box()
    assert box["y"] + box["height"] < SIZES["phone"][1] / 2
    assert "28.81 minutes" in demo.page.inner_text("h1")


def test_it_prints_on_paper(demo, tmp_path):
    demo.show("desktop", "dark")
    content = demo.page.pdf(prefer_css_page_size=True)
    assert content.startswith(b"%PDF") and 3 < content.count(b"/Type /Page\n") < 12
    demo.page.emulate_media(media="print", color_scheme="dark")
    demo.page.set_viewport_size({"width": 688, "height": 1000})  # A4 without its margins
    demo.page.wait_for_function(
        "() => document.querySelector('.main-svg').getBoundingClientRect().width === 640"
    )
    assert demo.page.evaluate("document.documentElement.scrollWidth") <= 688
    color = demo.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert color == "rgb(255, 255, 255)" and demo.problems == []
    demo.page.emulate_media(media="screen")
