"""Parts of report pages: escaped text, tables, pictures inside the page, charts."""

import base64
import io
import re

import numpy as np
from PIL import Image

from tests.train.run_folders import line, lines, run_folder, troubled_folder
from train.report_parts import Html, charts, code, csv_table, picture, spread, table, text
from train.report_run import read_run


def noise(path, width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def embedded(figure):
    kind, data = re.search(r'src="data:image/(\w+);base64,([^"]*)"', figure).groups()
    return kind, base64.b64decode(data)


def test_escapes_all_but_what_is_markup_already():
    assert text("<b> & \"'") == "&lt;b&gt; &amp; &quot;&#x27;"
    assert text([1, True, "<"]) == "1 true &lt;"
    assert text(Html("<b>")) == "<b>"
    assert code("<i>") == "<code>&lt;i&gt;</code>"
    made = table(("<h>", "n"), [("<a>", code("<b>")), ("x", None)], numbers=(1,))
    assert "&lt;h&gt;" in made
    assert '<th scope="row">&lt;a&gt;</th><td class="number"><code>&lt;b&gt;</code></td>' in made


def test_a_table_that_was_not_written_to_its_end_is_an_empty_one(tmp_path):
    (tmp_path / "per_class.csv").touch()
    assert csv_table(tmp_path / "per_class.csv")[1] == 0


def test_reads_a_table_of_classes(tmp_path):
    (tmp_path / "c.csv").write_text('label,class,top1\n0,"a, <b>",50.00\n1,c\n2,d,10.00\n')
    made, count = csv_table(tmp_path / "c.csv")
    assert count == 2
    assert '<td>a, &lt;b&gt;</td><td class="number">50.00</td>' in made


def test_holds_a_picture_as_it_is_and_a_large_one_smaller(tmp_path):
    noise(tmp_path / "small.png", 60, 40)
    figure = picture(tmp_path / "small.png", "<t>")
    assert embedded(figure) == ("png", (tmp_path / "small.png").read_bytes())
    assert 'width="60" height="40" alt="&lt;t&gt;"' in figure
    assert "<figure>" in figure
    pixels = noise(tmp_path / "large.png", 1800, 60)
    figure = picture(tmp_path / "large.png", "t")
    kind, data = embedded(figure)
    assert kind == "webp"
    with Image.open(io.BytesIO(data)) as made:
        assert made.size == (1600, 53)
        assert abs(np.asarray(made).mean() - pixels.mean()) < 2
    assert '<figure class="wide">' in figure


def test_says_which_picture_is_damaged(tmp_path):
    noise(tmp_path / "a.png", 60, 40)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    (tmp_path / "b.png").write_bytes(b"")
    for name in ("a.png", "b.png"):
        made = picture(tmp_path / name, "t")
        assert "<img" not in made
        assert f"{name} cannot be read" in made


def test_chooses_the_first_the_last_and_some_between():
    assert spread(range(5), 6) == [0, 1, 2, 3, 4]
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread(range(100), 1) == [99]


def test_draws_all_that_a_run_reports_and_nothing_else(tmp_path):
    run = read_run(run_folder(tmp_path / "a"))
    made = charts([run], ["a"])
    titles = re.findall(r"<figcaption>(.*?)<", made)
    # skipped clips and steps not finite, of which there are none, are left out
    names = ["Loss", "Gradient norm", "Learning rate", "Clips per second", "Waiting for data", "Batches ready"]
    assert titles == [*names, "Decoding"]
    lines(tmp_path / "a" / "metrics.jsonl", [])
    assert "no curve yet" in charts([read_run(tmp_path / "a")], ["a"])


def test_draws_validations_beside_the_loss_what_is_new_last_and_marks_trouble(tmp_path):
    made = charts([read_run(troubled_folder(tmp_path / "a"))], ["a"])
    titles = re.findall(r"<figcaption>(.*?)<", made)
    assert titles[:2] == ["Loss", "Accuracy"]
    assert titles[-3:] == ["Clips skipped", "Steps not finite", "new measure"]
    loss = re.search(r"<figure>.*?</figure>", made)[0]
    assert "<title>resumed at step 40</title>" in loss
    assert "<title>step 38 was not finite</title>" in loss
    # for the spike
    assert "logarithmic" in loss


def test_joins_evaluations_of_which_each_tells_of_something_else(tmp_path):
    run_folder(tmp_path / "a")
    found = [{"step": step, name: 1.0} for step in (1, 2) for name in ("probe_knn", "contrast_top1")]
    lines(tmp_path / "a" / "evaluations.jsonl", found)
    figures = re.findall(r"<figure>.*?</figure>", charts([read_run(tmp_path / "a")], ["a"]))
    for figure in figures[1:3]:
        assert re.sub("[^A-Z]", "", re.search(r'<path d="([^"]*)"', figure)[1]) == "ML"


def test_draws_a_curve_of_each_run_in_its_colour(tmp_path):
    runs = [read_run(run_folder(tmp_path / name)) for name in ("a", "b")]
    lines(tmp_path / "b" / "metrics.jsonl", [line(10, loss=None)])
    runs[1] = read_run(tmp_path / "b")
    figures = re.findall(r"<figure>.*?</figure>", charts(runs, ["a", "<b>"]))
    assert re.findall(r'<g class="(\w+)" data-label="(.*?)"', figures[0]) == [("c0", "a")]
    assert re.findall(r'<g class="(\w+)" data-label="(.*?)"', figures[1]) == [("c0", "a"), ("c1", "&lt;b&gt;")]


def test_says_when_losses_cannot_be_compared(tmp_path):
    run_folder(tmp_path / "a")
    run_folder(tmp_path / "b", config={"target.loss": "l1"})
    run_folder(tmp_path / "c", config={"mask.ratio": 0.9})
    a, b, c = (read_run(tmp_path / name) for name in "abc")
    assert "different losses" in charts([a, b], ["a", "b"])
    assert "different losses" not in charts([a, c], ["a", "c"])
