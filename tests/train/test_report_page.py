"""The page: it needs nothing but itself, shows names as they are, compares runs, and works in a real browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from tests.train.run_folders import STARTED, line, lines, run_folder, troubled_folder
from train.report_page import names_of, page
from train.report_run import read_run

VOID = {"meta", "link", "img", "br", "line", "circle", "path"}


class Elements(HTMLParser):
    """Every element with its attributes; the tags must match."""

    def __init__(self, html):
        super().__init__()
        self.found, self.open = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID or (tag == "line" and self.get_starttag_text()[-2] != "/"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def make(*runs, now=STARTED + 7200.0):
    return page([read_run(run) for run in runs], now=now, command="python -m train.report <&>")


def test_names_runs_by_what_tells_them_apart(tmp_path):
    assert names_of([tmp_path / "a"]) == ["a"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "b"]) == ["x/a", "y/a", "y/b"]


def test_needs_nothing_but_itself_and_shows_names_as_they_are(tmp_path):
    bad = troubled_folder(tmp_path / "<script>alert(2)<")
    for html in (make(bad), make(bad, run_folder(tmp_path / "b"))):
        elements = Elements(html).found
        # its own script, and what is loaded is inside
        assert [tag for tag, _ in elements].count("script") == 1
        loaded = [(tag, made[key]) for tag, made in elements for key in ("src", "href") if key in made]
        assert {tag for tag, _ in loaded} == {"a", "img", "link"}
        assert all(value.startswith("#" if tag == "a" else "data:") for tag, value in loaded)
        assert not [made for _, made in elements if any(key.startswith("on") or key == "style" for key in made)]
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
        assert "<script>alert" not in html
        policy = next(made["content"] for tag, made in elements if made.get("http-equiv"))
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        links = [value[1:] for tag, value in loaded if tag == "a"]
        assert links == [made["id"] for tag, made in elements if tag == "section"]


def test_compares_runs_by_what_differs(tmp_path):
    first = run_folder(tmp_path / "a", config={"mask.ratio": 0.75})
    second = run_folder(tmp_path / "b", range(10, 51, 10), config={"mask.ratio": 0.9, "own": 3}, commit="abc")
    html = make(first, second)
    differ = html.split('<section id="differ">')[1].split("</section>")[0]
    before, *folds = differ.split("<details>")
    assert re.findall(r'<code class="whole">(.*?)</code>', before) == ["--mask.ratio"]
    assert "<td>0.75</td><td>0.9</td>" in before
    assert "--own" in folds[0]
    assert "abc" in folds[1]
    runs = html.split('<section id="runs">')[1].split("</section>")[0]
    assert "finished, 100 steps" in runs
    assert "stopped at step 50 of 100" in runs
    assert html.count('<details class="box">') == 2


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    return found or pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")


def browse(path, *flags):
    """The DOM of a local page after its scripts, and what the console said. There is no network."""
    quiet = ("--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync")
    quiet += ("--disable-default-apps", "--disable-extensions", "--disable-gpu", "--disable-dev-shm-usage")
    command = [chromium(), "--headless", "--no-sandbox", *quiet, f"--user-data-dir={path.parent}/profile", "--dump-dom"]
    command += ["--proxy-server=http://127.0.0.1:9", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# loads a page in a frame, moves a pointer over each curve, and writes down what is there
MEASURE = """<iframe id="frame" width="WIDTH" height="900" src="SOURCE"></iframe><pre id="measured"></pre><script>
document.getElementById("frame").addEventListener("load", event => {
  const page = event.target.contentDocument, size = element => {
    const box = element.getBoundingClientRect();
    return [box.width, box.height];
  };
  for (const each of page.querySelectorAll("details")) each.open = true;
  const curves = [...page.querySelectorAll("svg")];
  const tips = curves.map(svg => {
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 9}));
    return svg.parentElement.querySelector(".tip").textContent;
  });
  document.getElementById("measured").textContent = JSON.stringify({
    images: [...page.images].map(image => [image.naturalWidth, ...size(image)]),
    curves: curves.map(size),
    lines: [...page.querySelectorAll("svg path:not(.band)")].map(path => path.getTotalLength()),
    tips,
    buttons: page.querySelectorAll(".copy button").length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    page: page.defaultView.getComputedStyle(page.body).backgroundColor,
    title: page.title,
    loaded: page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name),
  });
});
</script>"""


def measure(path, width, *browser):
    frame = path.with_name("frame.html")
    frame.write_text(MEASURE.replace("WIDTH", str(width)).replace("SOURCE", path.name))
    dom, console = browse(frame, *browser)
    return json.loads(unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.S)[1])), console


@pytest.mark.long
def test_a_browser_shows_it_without_errors_and_without_the_network(tmp_path):
    html = make(troubled_folder(tmp_path / "<script>alert(2)<"))
    (tmp_path / "report.html").write_bytes(html.encode("utf-8", "backslashreplace"))
    found, console = measure(tmp_path / "report.html", 360)
    assert console == []
    assert [name for name in found["loaded"] if not name.startswith("data:")] == []
    assert found["title"] == "<script>alert(2)<"
    # one of the two samples is damaged
    assert len(found["images"]) == 1
    assert all(min(sizes) > 0 for sizes in found["images"] + found["curves"])
    assert len(found["curves"]) == html.count("<svg ") == 11
    # the new measure has one point, which is a dot
    assert sorted(length > 0 for length in found["lines"]) == [False] + [True] * 11
    assert found["tips"][1] == "step 40Probe: nearest neighbours: 20Probe: linear: 40"
    assert found["buttons"] == 1
    assert found["overflow"] == 0


@pytest.mark.long
def test_a_browser_shows_several_runs_wide_and_dark(tmp_path):
    for name in ("a", "b", "c"):
        run_folder(tmp_path / name)
    # longer than what is drawn as it is
    lines(tmp_path / "c" / "metrics.jsonl", (line(step, loss=float(step == 2000)) for step in range(1, 5001)))
    (tmp_path / "report.html").write_text(make(*(tmp_path / name for name in "abc")))
    dark = "--blink-settings=preferredColorScheme=0"
    found, console = measure(tmp_path / "report.html", 1280, dark)
    assert console == []
    assert [name for name in found["loaded"] if not name.startswith("data:")] == []
    assert len(found["images"]) == 6
    assert all(min(sizes) > 0 for sizes in found["images"] + found["curves"])
    assert len(found["lines"]) == 3 * len(found["curves"])
    assert found["overflow"] == 0
    assert max(map(int, re.findall(r"\d+", found["page"]))) < 60


@pytest.mark.long
def test_the_browser_would_tell_of_errors_and_of_the_network(tmp_path):
    """That the tests above can fail."""
    (tmp_path / "report.html").write_text('<img src="http://elsewhere.test/a.png"><script>nothing()</script>')
    found, console = measure(tmp_path / "report.html", 360)
    assert any("nothing is not defined" in said for said in console)
    assert found["loaded"] == ["http://elsewhere.test/a.png"]
    assert found["images"][0][0] == 0
