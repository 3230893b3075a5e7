"""The report page: that a browser can read it with nothing else at hand, and that it says what the build says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minitron.cli.main import command_line
from minitron.cli.report import write_report
from minitron.cli.report.axis import Scale, tick_label
from minitron.cli.report.charts import Spot, front
from minitron.cli.report.curves import read_curves
from minitron.cli.report.markup import Markup, element
from minitron.cli.report.scores import read_scores
from minitron.specs.builds import COVARIANCE, EXPERT_OUTPUTS, EXPERT_TOKENS
from minitron.specs.errors import WorkError

from .browser import Browser
from .test_search_sections import SEARCH
from .test_startup import PROBE, start

VOID = {"meta", "br"}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell")


class Page(HTMLParser):
    """Reads a page and holds every tag against its end, every attribute and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def values(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


def write_scores(build: Path, plan: dict[str, Any]) -> None:
    """Scores for the plan of conftest.py: five layers of which the third goes, hidden channels, neurons, heads."""
    rng = np.random.default_rng(0)
    scores = {"hidden_size": rng.random(64), "num_hidden_layers": np.array([5.0, 2.0, 0.1, 3.0, 4.0])}
    scores |= {f"intermediate_size.{layer}": rng.random(172) for layer in range(5)}
    scores |= {f"num_attention_heads.{layer}": rng.random((4, 2)) for layer in range(5)}
    save_file({key: value.astype(np.float32) for key, value in scores.items()}, build / "scores.safetensors")
    plan["selection"] = {
        "num_hidden_layers": [[0, 1, 3, 4]],
        "hidden_size": [list(range(48))],
        "intermediate_size": [list(range(layer, layer + 96)) for layer in range(4)],
        "num_key_value_heads": [[0, 1, 3]] * 4,
        "num_attention_heads": [[0, 1, 2, 3, 6, 7]] * 4,
    }
    (build / "plan.json").write_text(json.dumps(plan))


@pytest.fixture
def whole(build: Path, plan: dict[str, Any]) -> Path:
    plan["spec"]["resolved"] = {"name": "tiny", "student": {"hidden_size": 48}}
    write_scores(build, plan)
    return build


def test_the_page_stands_alone(whole: Path) -> None:
    page = Page(write_report(whole))
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "srcset", "xlink:href"} & {key for _, key, _ in page.attributes}
    assert all(value.startswith("#") for value in page.values("href"))
    assert not any(key.startswith("on") for _, key, _ in page.attributes), "handlers are scripts"
    source = (whole / "report.html").read_text()
    assert "url(" not in source and "@import" not in source
    assert "default-src 'none'" in "".join(page.values("content"))


def test_it_says_what_the_build_says(whole: Path) -> None:
    page = Page(write_report(whole))
    for words in (
        "260,032 parameters → 130,016 parameters (50.0%)",
        "RMSNorm | see above",  # the reason of an axis
        "graph against student",  # a check
        "3.1e-07",
        "12.0 MiB",  # peak memory of a phase
        "recovered: 90.0% of the loss that pruning cost",
        "there was a little girl",  # what the teacher wrote
        "hidden_size: 48",  # the resolved spec
    ):
        assert words in page.text


def test_a_finished_build_misses_nothing_and_an_interrupted_one_says_how_far_it_is(whole: Path) -> None:
    assert f"Training is at 0.4% of its tokens: `minitron train {whole}` goes on." in Page(write_report(whole)).words
    (whole / "training.yaml").write_text("tokens: 12288\n")
    assert "What is not there yet" not in Page(write_report(whole)).values("aria-label")


def test_every_picture_has_a_title_a_description_and_its_numbers_in_a_table(whole: Path) -> None:
    page = Page(write_report(whole))
    names = [name for value in page.values("aria-labelledby") for name in value.split()]
    identities = page.values("id")
    assert len(identities) == len(set(identities)) and set(names) <= set(identities)
    pictures = page.tags.count("svg")
    # Depth, hidden channels; neurons, heads and groups of five layers; loss, learning rate, tokens a second.
    assert pictures == len(names) / 2 == 2 + 3 * 5 + 3
    assert page.values("role").count("img") == pictures
    assert {"Scores of hidden_size", "Scores of num_key_value_heads", "Training by tokens"} <= set(page.words)


def test_whatever_a_document_holds_is_text(whole: Path, plan: dict[str, Any], results: dict[str, Any]) -> None:
    wicked = "</td><script>alert(1)</script>\"'&\x1b[31m\ud800"
    plan["spec"] |= {"name": wicked, "resolved": {"name": wicked}}
    plan["axes"][0]["reason"] = wicked
    results["prompt"] = results["models"]["teacher"]["continuation"] = wicked
    (whole / "plan.json").write_text(json.dumps(plan))
    (whole / "results.json").write_text(json.dumps(results))
    page = Page(write_report(whole))
    assert "script" not in page.tags
    assert page.text.count("</td><script>alert(1)</script>\"'&�[31m�") >= 4


def test_attributes_are_escaped_and_markup_is_not() -> None:
    inner = element("b", 'a "quoted" <word>')
    assert element("p", inner, class_='x"y', aria_label=None) == (
        '<p class="x&quot;y"><b>a &quot;quoted&quot; &lt;word&gt;</b></p>'
    )
    assert isinstance(inner, Markup) and element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_a_build_that_is_only_compiled_says_what_is_missing_and_how_to_get_it(whole: Path) -> None:
    (whole / "results.json").unlink()
    (whole / "train" / "metrics.jsonl").unlink()
    page = Page(write_report(whole))
    assert f"Not trained yet: `minitron train {whole}`." in page.words
    assert f"Not evaluated yet: `minitron eval {whole}`." in page.words
    assert "#training" not in page.values("href") and "#importance" in page.values("href")


def test_a_training_plan_alone_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "training.yaml").write_text("name: x\n")
    page = Page(write_report(tmp_path))
    for words in ("There is no plan", "No importance scores", "Nothing to train", "Not evaluated yet"):
        assert words in page.text


def test_what_stays_is_marked_layer_by_layer_and_a_dropped_layer_whole(whole: Path, plan: dict[str, Any]) -> None:
    axes = {one.axis: one for one in read_scores(whole, plan)}
    assert list(axes)[:2] == ["num_hidden_layers", "hidden_size"]
    assert axes["num_hidden_layers"].lists[0].kept.tolist() == [True, True, False, True, True]
    assert axes["hidden_size"].lists[0].kept.sum() == 48
    neurons = axes["intermediate_size"].lists
    assert [one.layer for one in neurons] == [0, 1, 2, 3, 4]
    assert [one.dropped_layer for one in neurons] == [False, False, True, False, False]
    # The lists are those of kept layers: the third one belongs to layer 3.
    assert np.flatnonzero(neurons[3].kept).tolist() == list(range(2, 98))
    assert not neurons[2].kept.any()


def test_a_group_is_worth_the_l2_of_its_query_heads(whole: Path, plan: dict[str, Any]) -> None:
    axes = {one.axis: one for one in read_scores(whole, plan)}
    heads = axes["num_attention_heads"].lists[1].values.reshape(4, 2)
    assert np.allclose(axes["num_key_value_heads"].lists[1].values, np.linalg.norm(heads, axis=1))
    assert axes["num_key_value_heads"].lists[1].kept.tolist() == [True, True, False, True]


def test_an_axis_that_was_not_narrowed_is_kept_whole(whole: Path, plan: dict[str, Any]) -> None:
    del plan["selection"]["intermediate_size"]
    neurons = {one.axis: one for one in read_scores(whole, plan)}["intermediate_size"]
    assert not neurons.chosen
    assert [bool(one.kept.all()) for one in neurons.lists] == [True, True, False, True, True]
    (whole / "plan.json").write_text(json.dumps(plan))
    assert "Not narrowed: everything of a kept layer stays." in Page(write_report(whole)).words


def test_what_lies_beside_the_scores_is_no_axis(whole: Path, plan: dict[str, Any]) -> None:
    beside = {f"{COVARIANCE}.hidden": (4, 4), f"{EXPERT_TOKENS}.1": (4,), f"{EXPERT_OUTPUTS}.1": (4, 8)}
    scores = {name: np.ones(shape, dtype=np.float32) for name, shape in {"num_experts.1": (4,), **beside}.items()}
    save_file(scores, whole / "scores.safetensors")
    assert [one.axis for one in read_scores(whole, plan)] == ["num_experts"]


def test_scores_that_cannot_be_read_are_named(whole: Path) -> None:
    (whole / "scores.safetensors").write_bytes(b"no")
    with pytest.raises(WorkError, match=r"scores\.safetensors: cannot be read .* compile again"):
        write_report(whole)


def test_a_search_is_drawn_with_its_front(whole: Path, results: dict[str, Any]) -> None:
    results["search"] = {"winner": 2, "candidates": SEARCH["candidates"]}
    (whole / "results.json").write_text(json.dumps(results))
    page = Page(write_report(whole))
    assert "Divergence after the first rung against parameters" in page.words
    assert "candidate 2, 1.00M: 0.8" in page.words, "a point says what it is"
    assert "2 points, 2 of them on the front: candidate 1, 1.00M: 0.9; candidate 2, 1.00M: 0.8." in page.words
    assert "candidate 3" not in page.text, "what diverged has no place in a chart"
    assert "the best" in page.words and page.words.count("Search") == 2


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_no_point_is_better_than_the_front(places: list[tuple[int, int]]) -> None:
    spots = [Spot(float(x), float(y), "") for x, y in places]
    found = front(spots)
    for spot in spots:
        assert any(one.x <= spot.x and one.y <= spot.y for one in found)
    for one in found:
        assert not any((spot.x, spot.y) != (one.x, one.y) and spot.x <= one.x and spot.y <= one.y for spot in spots)


def records(steps: int) -> Iterator[dict[str, Any]]:
    for step in range(1, steps + 1):
        held_out = {"held_out_loss": 3.0 - step / steps} if step % (steps // 4) == 0 else {}
        yield {"step": step, "tokens": 512 * step, "loss": float(step % 10), "forward_kl": float(step % 10), **held_out}


def test_a_long_run_becomes_a_few_hundred_points_and_loses_no_step() -> None:
    curves = read_curves(records(50_000))
    assert 200 <= len(curves.points) <= 400
    assert curves.records == 50_000 == sum(point.records for point in curves.points)
    figures = [point.figures["loss"] for point in curves.points]
    assert sum(one.total for one in figures) == sum(step % 10 for step in range(1, 50_001))
    assert all((one.low, one.high) == (0, 9) and abs(one.mean - 4.5) < 0.2 for one in figures)
    assert curves.points[-1].tokens == 512 * 50_000
    assert [place / 512 for place, _ in curves.of("held_out_loss")][-1] == 50_000


def test_a_short_run_is_drawn_step_by_step() -> None:
    curves = read_curves(records(12))
    assert curves.each == 1 and [point.step for point in curves.points] == list(range(1, 13))


def test_the_page_of_a_long_run_says_that_it_is_thinned_out_and_stays_small(whole: Path) -> None:
    with (whole / "train" / "metrics.jsonl").open("w") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records(20_000))
    page = Page(write_report(whole))
    assert re.search(r"20,000 steps, drawn as \d{3} points: each is the mean of up to \d+ steps in a row", page.text)
    assert (whole / "report.html").stat().st_size < 500_000
    # forward_kl is the loss, so it is not drawn a second time.
    assert "forward kl" not in page.text and "Held-out loss (nats a token)" in page.words


def test_what_is_not_a_number_is_left_out_of_the_curves_and_counted(whole: Path) -> None:
    with (whole / "train" / "metrics.jsonl").open("a") as lines:
        lines.write(
            '{"step": 4, "tokens": 16384, "loss": NaN, "lr": Infinity, "note": "x", "flag": true}\n{"step": 5, "to'
        )
    page = Page(write_report(whole))
    assert "2 figures were not finite numbers and are left out." in page.text
    assert not re.search(r"\b(nan|inf)\b", " ".join(page.values("points")))


def test_held_out_loss_stands_beside_teacher_and_pruned_student(whole: Path) -> None:
    with (whole / "train" / "metrics.jsonl").open("w") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records(8))
    described = next(words for words in Page(write_report(whole)).words if "teacher: 1.25." in words)
    assert described.startswith("From 2.75 at 1,024 tokens to 2 at 4,096") and "pruned: 3.75." in described


def test_the_correction_of_the_teacher_has_curves_of_its_own(whole: Path) -> None:
    assert "#correction" not in Page(write_report(whole)).values("href")
    (whole / "train" / "teacher").mkdir()
    (whole / "train" / "teacher" / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "loss": 2.5}\n')
    page = Page(write_report(whole))
    assert "#correction" in page.values("href") and "From 2.5 at 64 tokens to 2.5 at 64." in page.words
    assert len(page.values("id")) == len(set(page.values("id")))


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3.2, 4.1), (1999.0, 2400.0), (1e-6, 2e-3), (5.0, 5.0)])
def test_ticks_are_round_numbers_within_the_range(low: float, high: float) -> None:
    axis = Scale(low, high, 0, 100)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8 and all(low - 1e-12 <= one <= high + 1e-12 for one in ticks)
    assert all(0 <= axis(one) <= 100.0001 for one in ticks)
    assert len({tick_label(one) for one in ticks}) == len(ticks)


@pytest.mark.parametrize(
    "value, words", [(0, "0"), (0.002, "0.002"), (5e-5, "5e-05"), (2200, "2.2k"), (160_000, "160k"), (3e9, "3G")]
)
def test_tick_labels_are_short(value: float, words: str) -> None:
    assert tick_label(value) == words


def test_show_html_prints_where_the_page_is(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["show", str(whole), "--html"]) == 0
    assert capsys.readouterr().out == f"{whole / 'report.html'}\n"
    assert command_line(["show", str(whole), "--html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format_version": 1, "report": str(whole / "report.html")}


def test_show_html_of_what_is_no_build_is_a_wrong_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["show", str(tmp_path), "--html"]) == 2
    assert "not a build folder" in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_the_same_build_gives_the_same_page(whole: Path) -> None:
    first = write_report(whole).read_bytes()
    assert write_report(whole).read_bytes() == first


def test_it_needs_no_torch(whole: Path) -> None:
    done = start("-c", PROBE, "show", str(whole), "--html")
    assert (done.returncode, done.stderr) == (0, "imported: numpy\n")


# Every text of every chart: its rectangle on the screen, its height, the colour that it has on the page.
TEXTS = """[...document.querySelectorAll('svg')].map(svg => [...svg.querySelectorAll('text')].map(text => {
  const box = text.getBoundingClientRect();
  return {text: text.textContent, left: box.left, right: box.right, top: box.top, bottom: box.bottom};
}))"""


def apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two texts leave each other room; a line's box is higher than its letters by some pixels."""
    slack = 3
    return bool(
        one["right"] <= other["left"] or other["right"] <= one["left"]
        or one["bottom"] - slack <= other["top"] or other["bottom"] - slack <= one["top"]
    )  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280], ids=["a phone", "a desk"])
def test_it_can_be_read_wherever_it_is_read(whole: Path, tmp_path: Path, width: int) -> None:
    """Nothing is wider than the screen, letters in charts are large enough and do not overlap, in light and dark."""
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(CHROMIUM)})")
    write_curve(whole, losses=[3.8, 2.5, 1.6])
    page = write_report(whole)
    browser = Browser(program, tmp_path)
    colours = set()
    try:
        for scheme in ("light", "dark"):
            browser.show(page, width, 900, scheme)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            colours.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
            charts = [chart for chart in browser.evaluate(TEXTS) if chart]
            assert charts
            for chart in charts:
                for index, one in enumerate(chart):
                    assert one["bottom"] - one["top"] >= 10, f"{one['text']} is too small"
                    for other in chart[:index]:
                        # Crosses under neighbouring bars are marks, not words.
                        marks = "×" in (one["text"], other["text"])
                        assert marks or apart(one, other), f"{one['text']} and {other['text']} overlap"
            order = browser.evaluate("[...document.querySelectorAll('h2')].map(title => title.id)")
            assert order[:2] == ["results", "training"] and order.index("plan") > order.index("verification")
    finally:
        browser.close()
    assert len(colours) == 2


def write_curve(build: Path, losses: list[float]) -> None:
    """A training whose loss ends near the teacher's, where its label has little room."""
    lines = [
        {"step": step, "tokens": step * 4096, "loss": loss, "lr": 1e-4, "held_out_loss": loss}
        for step, loss in enumerate(losses, 1)
    ]
    (build / "train").mkdir(exist_ok=True)
    (build / "train" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_a_browser_draws_it_and_has_nothing_to_complain_of(whole: Path, tmp_path: Path, scheme: int) -> None:
    browser = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(CHROMIUM)})")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,3000",
            f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", write_report(whole).as_uri(),
        ],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ":CONSOLE" not in done.stderr, done.stderr
    assert picture.stat().st_size > 50_000, "an empty page is a few kilobytes"
