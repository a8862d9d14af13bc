"""The report: the seed's own runs with their figures, and what it says, draws and keeps out of its page."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image

from fastflower.report import curves
from fastflower.report.curves import plot_accuracy, plot_bubbles, plot_curves, plot_epoch_time
from fastflower.report.history import History, read_histories
from fastflower.report.page import Report, convergence, levels, write_report
from fastflower.runtime.run_folder import read_rows
from fastflower.settings import build, load_yaml, to_plain
from tests.conftest import copy_run, fastflower, train_arguments
from tests.report.test_history import row, with_accuracies, write_run

# Best validation accuracy and its epoch, epochs to 50, 60 and 70 %, seconds an epoch.
SEED: dict[str, tuple[float, int, int, int, int | None, int]] = {
    "plain34": (0.718, 63, 15, 29, 39, 111),
    "resnet34": (0.730, 41, 12, 16, 28, 113),
    "resnet50": (0.638, 44, 21, 31, None, 208),
    "pretrained_resnet50": (0.911, 32, 1, 1, 1, 200),
}


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def pictures(self) -> list[str]:
        """The SVG texts."""
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        return [base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode() for source in sources]


def histories(folders: Sequence[Path]) -> list[History]:
    runs, without = read_histories(folders)
    assert not without
    return runs


@pytest.fixture(scope="module")
def seed_report(seed_curves: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write_report([seed_curves / name for name in SEED], tmp_path_factory.mktemp("seed"))


@pytest.mark.parametrize("name", SEED)
def test_the_seeds_runs_have_their_figures(name: str, seed_report: Report) -> None:
    best, epoch, *reached, seconds = SEED[name]
    cells = seed_report.rows[name]
    assert cells["best val accuracy"] == pytest.approx(best, abs=0.0005)
    assert cells["at epoch"] == epoch
    assert [cells[f"epochs to {level}%"] for level in (50, 60, 70)] == reached
    assert cells["seconds an epoch"] == pytest.approx(seconds, abs=1)
    assert cells["images/s"] is cells["MACs (G)"] is None  # the events do not say


def test_the_seeds_runs_are_compared_in_sentences(seed_report: Report, seed_curves: Path) -> None:
    assert convergence(histories([seed_curves / name for name in ("plain34", "resnet34", "resnet50")])) == [
        "resnet34 reaches 50% after 12 epochs, 3 before plain34, 9 before resnet50.",
        "resnet34 reaches 60% after 16 epochs, 13 before plain34, 15 before resnet50.",
        "resnet34 reaches 63.8% after 23 epochs, 16 before plain34, 21 before resnet50.",
        "resnet34 reaches 70% after 28 epochs, 11 before plain34; resnet50 never does.",
    ]
    assert seed_report.sentences[0].startswith("pretrained_resnet50 reaches 50% after 1 epoch, 11 before resnet34")


def test_the_page_and_the_pictures_hold_the_seeds_runs(seed_report: Report) -> None:
    page = Page(seed_report.page)
    cells = [text for text in page.texts if text.strip()]
    for name, (best, *_) in SEED.items():
        assert f"{best:.1%}" in cells[cells.index(name) :][:4]
    drawn = {"curves", "accuracy", "epoch_time"}
    assert len(page.pictures) == len(drawn)
    files = {path.name for path in seed_report.page.parent.iterdir()} - {"report.html"}
    assert files == {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")}
    for name in drawn:
        with Image.open(seed_report.page.with_name(f"{name}.png")) as image:
            assert min(image.size) > 500


def test_the_page_loads_nothing(seed_report: Report) -> None:
    page = Page(seed_report.page)
    loading = {value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")}
    assert all(value and value.startswith("data:") for value in loading)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.source
    assert "@import" not in page.source
    policies = [attributes.get("content") for tag, attributes in page.tags if tag == "meta"]
    assert any(policy and policy.startswith("default-src 'none'") for policy in policies)
    for svg in page.pictures:  # they refer only to parts of themselves
        assert set(re.findall(r'(?:href="|url\()(.)', svg)) <= {"#"}


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    names = ["<script>alert(1)<", '"><img src=x onerror=alert(1)>', "a & b", "$rows $x^2$"]
    folders = [write_run(tmp_path / name, [row(1)]) for name in names]
    page = Page(write_report(folders, tmp_path / "out").page)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert set(names) <= set(page.texts)
    assert set(names) <= {attributes.get("data-value") for tag, attributes in page.tags if tag == "th"}


def test_runs_that_reach_an_accuracy_together_lead_together(tmp_path: Path) -> None:
    a, b, c = (
        with_accuracies(tmp_path / name, accuracies)
        for name, accuracies in (("a", [0.2, 0.5, 0.5]), ("b", [0.4, 0.55, 0.5]), ("c", [0.1, 0.2, 0.5001]))
    )
    final = with_accuracies(tmp_path / "final", [None, None])
    assert convergence([a, b, c, final]) == [
        "a and b reach 50% after 2 epochs, 1 before c.",
        "No run reaches 60%.",
        "No run reaches 70%.",
    ]
    low = with_accuracies(tmp_path / "low", [0.1239])
    assert convergence([a, low, c])[:2] == [
        "a and low reach 12.3% after 1 epoch, 1 before c.",
        "a reaches 50% after 2 epochs, 1 before c; low never does.",
    ]
    assert convergence([a])[0] == "a reaches 50% after 2 epochs."
    assert levels([final]) == []
    assert convergence([final]) == []


def test_a_final_fit_has_curves(tmp_path: Path) -> None:
    rows = [row(epoch, val_loss=None, val_accuracy=None, val_top5=None, val_macro_f1=None) for epoch in range(1, 4)]
    report = write_report([write_run(tmp_path / "final", rows)], tmp_path / "out")
    assert report.rows["final"]["best val accuracy"] is None
    assert report.rows["final"]["final train accuracy"] == 0.4
    assert report.sentences == []
    assert (tmp_path / "out" / "curves.png").is_file()
    assert "Convergence" not in report.page.read_text()


def test_a_trained_run_is_reported_with_its_cost(small: Path, tmp_path: Path, tiny_net: None) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert fastflower(*train_arguments(small, run), "--train.epochs", "2").code == 0
    out.mkdir()
    (out / "throughput.png").write_text("of an earlier report")
    result = fastflower("report", run, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert str(out / "report.html") in result.out.replace("\n", "")
    cells = write_report([run], out).rows["run"]
    # the convolutions of resnet18 at 32 pixels, and its last layer for 3 classes
    stages = (
        64 * 64 * 9 * 64 * 4,
        *[(c * c // 2 * 9 + 3 * c * c * 9 + c * c // 2) * (512 // c) ** 2 for c in (128, 256, 512)],
    )
    macs = 64 * 3 * 49 * 16**2 + sum(stages) + 3 * 512
    assert cells["MACs (G)"] == macs / 1e9
    assert cells["params (M)"] == 11_178_051 / 1e6
    names = {path.stem for path in out.glob("*.png")}
    assert names == {"curves", "accuracy", "accuracy_macs", "accuracy_speed", "epoch_time"}
    (run / "checkpoints" / "best.pt").write_text("damaged")
    assert write_report([run], out).rows["run"]["MACs (G)"] is None
    assert not (out / "accuracy_macs.svg").exists()


def test_a_mistake_is_a_sentence(tmp_path: Path) -> None:
    result = fastflower("report", tmp_path, "--out", tmp_path / "out")
    assert result.code == 2
    assert str(tmp_path) in result.err
    assert not (tmp_path / "out").exists()


def lab(color: str) -> np.ndarray:
    """A color in CIELAB, in which equal distances look equally large (CIE 1976, white point D65)."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = matrix @ linear / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / 3 / (6 / 29) ** 2 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_eight_runs_differ_in_color_and_in_marker_and_more_in_both_together() -> None:
    looks = [curves._look(number) for number in range(64)]
    colors = [lab(look["color"]) for look in looks[:8]]
    assert min(np.linalg.norm(a - b) for a, b in combinations(colors, 2)) > 20  # 2 can just be told apart
    assert max(lightness for lightness, _, _ in colors) < 75  # on white, of 100
    assert len({look["marker"] for look in looks[:8]}) == 8
    assert curves.DROP["marker"] not in {look["marker"] for look in looks}
    assert len({(look["color"], look["marker"]) for look in looks}) == 64


def numbers(axes: Axes, axis: str) -> list[float]:
    """What the ticks within an axis say."""
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    ticks = axes.get_xticks() if axis == "x" else axes.get_yticks()
    formatter = (axes.xaxis if axis == "x" else axes.yaxis).get_major_formatter()
    texts = formatter.format_ticks(list(ticks))
    return [float(text) for tick, text in zip(ticks, texts, strict=True) if low <= tick <= high and text]


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("cost", [1.8236, 812.5, 3e-4])
def test_equal_values_have_axes_that_can_be_read(accuracy: float, cost: float, tmp_path: Path) -> None:
    same = {"val_accuracy": accuracy, "train_accuracy": accuracy, "val_loss": 2.5, "train_loss": 2.5}
    runs = histories([write_run(tmp_path / name, [row(1, **same)]) for name in "ab"])
    bubbles = plot_bubbles(runs, [cost] * 2, [10**6] * 2, "cost")
    assert bubbles
    loss, accuracies = plot_curves(runs).axes
    for axes in (accuracies, plot_accuracy(runs, []).axes[0], bubbles.axes[0]):
        low, high = axes.get_ylim()
        assert -2 <= low < 100 * accuracy < high <= 102
        assert high - low >= 1.9
        assert all(0 <= number <= 100 for number in numbers(axes, "y"))
        assert len(set(numbers(axes, "y"))) >= 3
    for axes in (loss, accuracies):
        assert numbers(axes, "x") == [1]
    low, high = loss.get_ylim()
    assert low * 1.2 < high
    assert low < 2.5 < high
    low, high = bubbles.axes[0].get_xlim()
    assert low * 1.2 < high
    shown = numbers(bubbles.axes[0], "x")
    assert len(set(shown)) >= 3
    assert all(low <= number <= high for number in shown)  # and no offset that is to be added to them


def test_learning_rate_drops_are_marked(tmp_path: Path) -> None:
    rows = [row(epoch, lr=0.1 if epoch < 3 else 0.01) for epoch in range(1, 5)]
    (run,) = histories([write_run(tmp_path / "run", rows)])
    for axes in plot_curves([run]).axes:
        marks = [
            np.asarray(line.get_xdata()).tolist() for line in axes.lines if line.get_marker() == curves.DROP["marker"]
        ]
        assert marks == [[3]]
        assert axes.get_xlabel() == "epoch"
    assert [axes.get_ylabel() for axes in plot_curves([run]).axes] == [
        "loss (cross-entropy, nats)",
        "top-1 accuracy (%)",
    ]


def test_an_epochs_time_adds_up(tmp_path: Path) -> None:
    (run,) = histories([write_run(tmp_path / "run", [row(1), row(2)])])
    axes = plot_epoch_time([run]).axes[0]
    spans = [(patch.get_x(), patch.get_width()) for patch in axes.patches]  # type: ignore[attr-defined]
    assert spans == [(0, 8), (8, 2), (0, 1)]  # training, validation, waiting
    assert [text.get_text() for text in axes.texts] == ["10 s"]


def test_bubbles_are_of_runs_of_which_all_is_known(tmp_path: Path) -> None:
    runs = [with_accuracies(tmp_path / name, [0.5]) for name in "abc"]
    figure = plot_bubbles(runs, [1, 2, None], [100, 400, 400], "MACs")
    assert figure
    areas = [collection.get_sizes()[0] for collection in figure.axes[0].collections]  # type: ignore[attr-defined]
    assert areas == [curves.LARGEST / 4, curves.LARGEST]
    assert plot_bubbles(runs, [1, 2, 3], [None] * 3, "MACs") is None


def test_one_epoch_can_be_drawn(tmp_path: Path) -> None:
    run = with_accuracies(tmp_path / "run", [0.0])
    for figure in (plot_curves([run]), plot_accuracy([run], levels([run])), plot_epoch_time([run])):
        assert figure.axes[0].lines or figure.axes[0].patches


def test_ten_runs_are_read_in_80_columns(finished: Path, tmp_path: Path) -> None:
    folders = [copy_run(finished, tmp_path / f"run_with_lr_0.{k}") for k in range(1, 11)]
    result = fastflower("report", *folders, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    table, costs, _ = result.out.split("\n\n")
    assert max(map(len, table.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith("run_with_lr")}
    assert list(rows) == [folder.name for folder in folders]
    best = max(epoch["val_accuracy"] for epoch in read_rows(finished / "metrics.jsonl"))
    assert f"{best:.1%}" in rows["run_with_lr_0.7"]
    lines = [line for line in costs.splitlines() if line.startswith("run_with_lr")]
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80


def test_macro_f1_is_that_of_the_epoch_with_the_best_accuracy(tmp_path: Path) -> None:
    rows = [row(1, val_accuracy=0.4, val_macro_f1=0.9), row(2, val_accuracy=0.5, val_macro_f1=0.375), row(3)]
    report = write_report([write_run(tmp_path / "run", rows)], tmp_path / "out")
    assert report.rows["run"]["macro F1"] == 0.375
    assert "0.375" in Page(report.page).texts


def test_settings_that_differ_are_shown(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [row(1)]) for name in ("a", "b", "events")]
    config = yaml.safe_load((folders[0] / "config.yaml").read_text())
    config["train"]["lr"] = 0.025
    config["data"]["scale"] = [264, 280]
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(config))
    (folders[2] / "config.yaml").unlink()
    report = write_report(folders, tmp_path / "out")
    before = to_plain(build(load_yaml(folders[0] / "config.yaml"), "a"))
    assert report.settings == {
        "a": {"data.scale": "256 480", "train.lr": str(before["train"]["lr"])},
        "b": {"data.scale": "264 280", "train.lr": "0.025"},
        "events": {},
    }
    assert {"data.scale", "train.lr", "264 280", "0.025"} <= set(Page(report.page).texts)
    shown = fastflower("report", *folders, "--out", tmp_path / "out").out
    assert "b       data.scale 264 280, train.lr 0.025" in shown
    alone = write_report(folders[1:], tmp_path / "out")
    assert not any(alone.settings.values())
    assert "settings that" not in fastflower("report", *folders[1:], "--out", tmp_path / "out").out


def test_no_run_at_all_is_a_sentence(tmp_path: Path) -> None:
    result = fastflower("report", "--out", tmp_path / "out")
    assert result.code == 2
    assert "fastflower report needs RUNS" in result.err


def test_folders_of_runs_and_of_cross_validation_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plain", "cv/fold-0", "cv/fold-1"):
        write_run(tmp_path / "runs" / name, [row(1)])
    write_run(tmp_path / "runs/begun", [])
    (tmp_path / "runs/cv/cv.json").write_text("{}")
    (tmp_path / "runs/notes.txt").write_text("of mine")
    monkeypatch.chdir(tmp_path)
    whole = fastflower("report", "runs", "--out", "out")
    assert whole.code == 0, whole.err
    given = fastflower("report", *sorted(Path("runs").glob("*")), "--out", "out")
    assert given.code == 0, given.err
    for result in (whole, given):
        names = [line.split()[0] for line in result.out.split("\n\n")[0].splitlines()[3:]]
        assert names == ["fold-0", "fold-1", "plain"], result.out
    for name in ("begun", "notes.txt"):
        assert f"Left out, since it holds no finished epoch of a run: runs/{name}" in given.out
        assert f"runs/{name}" in (tmp_path / "out/report.html").read_text()
    assert "Left out" not in whole.out


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Clicks each heading twice, and leaves what it sees in the page.
PROBE = """<script>
addEventListener("load", async () => {
  const seen = { sorted: {}, violations: [] };
  document.addEventListener("securitypolicyviolation", event => seen.violations.push(event.blockedURI));
  seen.widths = [...document.images].map(image => image.naturalWidth);
  for (const heading of document.querySelectorAll("thead th")) {
    const button = heading.querySelector("button");
    const orders = [1, 2].map(() => {
      button.click();
      const names = [...document.querySelectorAll("tbody th")].map(cell => cell.textContent);
      return [heading.getAttribute("aria-sort"), names];
    });
    seen.sorted[button.textContent] = orders;
    seen.marked = document.querySelectorAll("[aria-sort]").length;
    seen.focusable = (button.focus(), document.activeElement === button);
  }
  document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
  await new Promise(done => setTimeout(done, 500));
  document.body.dataset.seen = JSON.stringify(seen);
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_shows_the_pictures_and_sorts_the_table(tmp_path: Path) -> None:
    a = write_run(tmp_path / "run10", [row(epoch, val_accuracy=0.2 + 0.1 * epoch) for epoch in range(1, 13)])
    b = write_run(tmp_path / "run9", [row(epoch, val_accuracy=0.25) for epoch in range(1, 10)])
    c = write_run(tmp_path / "final", [row(epoch, val_accuracy=None) for epoch in range(1, 101)])
    report = write_report([a, b, c], tmp_path / "out")
    probed = tmp_path / "probed.html"
    probed.write_text(report.page.read_text().replace("</body>", f"{PROBE}</body>"))
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = f"{BROWSER} {switches} --disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    result = subprocess.run(
        [*command.split(), f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r'data-seen="([^"]*)"', result.stdout)
    assert match, result.stderr
    seen = json.loads(match[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert len(seen["widths"]) == 3
    assert min(seen["widths"]) > 0
    up, down = "ascending", "descending"
    assert seen["sorted"]["run"] == [[up, ["final", "run9", "run10"]], [down, ["run10", "run9", "final"]]]
    assert seen["sorted"]["epochs"] == [[up, ["run9", "run10", "final"]], [down, ["final", "run10", "run9"]]]
    # a run without the figure is last, whichever way
    assert seen["sorted"]["best val accuracy"] == [[up, ["run9", "run10", "final"]], [down, ["run10", "run9", "final"]]]
    assert (seen["marked"], seen["focusable"]) == (1, True)
    assert seen["violations"] == ["http://127.0.0.1:9/x.png"]
