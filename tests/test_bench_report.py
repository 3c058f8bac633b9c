"""The report of the benchmarks: every figure is in it, plots are not empty, and a browser opens it on a phone."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_results import COPY, SHAPES, full_plan, made_results, model_record, op_record

from fastconv.bench import html_report, plots
from fastconv.bench.plots import picture
from fastconv.bench.plots.plot import Marks
from fastconv.bench.records import variant

pytest.importorskip("matplotlib", reason="draws the plots")

RESULTS = made_results()
SPAN = "span_dynamic_conv infer ConvBERT base 8x512 bfloat16"
RED = "masked_attention step BERT base 8x512 bfloat16"
BROKEN = "layer_norm infer BERT base 8x512 bfloat16"


def results(*records, **other):
    """Results of the made-up card with these records."""
    return {**RESULTS, "records": {r["case"]: copy.deepcopy(r) for r in records}, **other}


class Page(HTMLParser):
    """What a page holds: its rows by case, its other text, its tags."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.rows, self.tags, self.text = {}, [], []
        self._cell = None
        self._head, self._heads = [], []
        self._row = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "thead":
            self._heads = []
        if tag in ("th", "td"):
            self._cell = []
        if tag == "tr":
            self._row = (attrs, [])
        if tag in ("small", "div", "br") and self._cell is not None:
            self._cell.append(" ")

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._row[1].append("".join(self._cell))
            self._cell = None
        if tag == "thead":
            self._heads = self._row[1]
        if tag == "tr" and "data-case" in self._row[0]:
            attrs, cells = self._row
            self.rows[attrs["data-case"]] = (attrs["class"].split(), dict(zip(self._heads, cells, strict=False)))

    def handle_data(self, data):
        self.text.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def row(self, case):
        return self.rows[case.lower()]


DRAWN = plots.plots


@pytest.fixture(scope="module")
def page():
    return html_report.page(RESULTS)


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page)


@pytest.fixture
def undrawn(monkeypatch):
    """No plots, which take most of the time."""
    monkeypatch.setattr(plots, "plots", lambda results: ([], []))


# Tables


def test_report_has_every_figure_of_an_op(parsed):
    record = RESULTS["records"][SPAN]
    classes, cells = parsed.row(SPAN)
    assert classes == ["case"]
    assert cells["case"].strip() == "infer ConvBERT base 8x512 bfloat16"
    # By hand: 3 us and 3.15 M elements of 5 bytes at 3 TB/s, of which it gets 85 %, are 9.17 us.
    assert cells["ms"] == "0.00917 0.00898 to 0.00944"
    assert cells["over HF"] == "11.00x 10.78 to 11.33 0.101 ms"
    assert cells["over torch compile"] == "3.00x 2.94 to 3.09 0.0275 ms"
    assert cells["over copy"].startswith("0.90x")
    assert cells["% of roof"] == f"{100 * record['of_roof']:.0f} % copy" == "57 % copy"
    assert cells["GB/s"] == "1,716" and cells["TFLOP/s"] == "24.0"
    assert cells["host, us a call"] == "11.0 HF 27.5 torch compile 27.5 copy 27.5"
    assert cells["graph replay, ms"] == "0.00733 HF 0.0807 torch compile 0.0220 copy 0.00660"
    assert cells["peak memory, MB"] == "6.29 HF 69.2 torch compile 18.9"
    assert cells["targets"].split() == ["HF", "1.5x:", "11.00x,", "reached", "copy", "0.85x:", "0.90x,", "reached"]


def test_report_has_every_figure_of_a_model(parsed):
    case = "model infer ConvBERT base 32x512 text bfloat16"
    classes, cells = parsed.row(case)
    seconds = {k: v["median"] for k, v in RESULTS["records"][case]["seconds"].items()}
    assert "missed" in classes and "target missed" in cells["case"]
    assert cells["tokens/s"].startswith(f"{9830 / seconds['fastconv']:,.0f} fastconv graphs ")
    assert f"HF compile {9830 / seconds['HF compile']:,.0f}" in cells["tokens/s"]
    assert cells["fastconv remove"].startswith(f"{1e3 * seconds['fastconv remove']:.3g} ms ")
    assert cells["HF / fastconv remove"].startswith("3.64x") and cells["HF memory"].startswith("3.33x")
    assert cells["over matmul"].startswith("0.60x")
    assert cells["mJ a token"] == "0.410 HF 0.930"
    assert cells["peak memory, MB"] == "88.5 HF 295"
    assert "HF compile 1.3x: 1.25x, missed" in cells["targets"]
    assert "HF / fastconv remove 3x: 3.64x, reached" in cells["targets"]


def test_report_shows_no_speed_of_wrong_results(parsed):
    classes, cells = parsed.row(RED)
    assert classes == ["case", "red"]
    assert list(cells) == ["case", "ms"]  # one cell over all columns
    assert cells["ms"] == (
        "No speed. dq: max error 3.1e-01, allowed 2.0e-03; dk: max error nan, allowed 2.0e-03"
    )  # fmt: skip


def test_report_shows_broken_and_absent_rivals(parsed):
    classes, cells = parsed.row(BROKEN)
    assert "broken" in classes
    assert "torch compile failed: RuntimeError: no compiler" in cells["case"]
    assert cells["over torch compile"] == "failed"
    assert parsed.row("layer_norm infer BERT base 1x32 bfloat16")[1]["over torch compile"].startswith("1.02x")
    without = copy.deepcopy(RESULTS["records"][BROKEN])
    del without["broken"]
    without["uncaptured"] = {"HF": "RuntimeError: a copy to the host"}
    found = Page(html_report.page(results(without, op_record("layer_norm", "BERT base", "infer", 1, 32))))
    assert found.row(BROKEN)[1]["over torch compile"] == ""
    assert "HF has no CUDA graph: RuntimeError: a copy to the host" in found.row(BROKEN)[1]["case"]


def test_report_leaves_out_columns_without_data(undrawn):
    on_cpu = Page(html_report.page(made_results(cuda=False)))
    for case in (SPAN, "model infer ConvBERT base 32x512 bfloat16"):
        cells = on_cpu.row(case)[1]
        assert cells["ms"] and not {"host, us a call", "graph replay, ms", "mJ a token"} & set(cells)
    text = " ".join(on_cpu.text)
    assert "capability" not in text and "cuda" not in text


def test_report_summary(undrawn):
    fast = op_record("layer_norm", "BERT base", "infer", 64, 512)  # torch 1.90x of 1.5x, copy 0.90x of 0.85x
    slow = op_record("layer_norm", "BERT base", "infer", 1, 32)  # torch 1.28x of 1.5x, copy 0.90x of 0.85x
    slow["targets"]["Liger"] = 1.0  # never measured
    slow["code"] = "of another day"
    found = html_report.page(results(fast, slow, RESULTS["records"][RED], tests="passed: 812"))
    tiles = re.findall(r'<div class="tile( bad)?"><b>(.*?)</b><span>(.*?)</span>', found)
    # The red case had two targets.
    assert [tile[1] for tile in tiles] == ["2", "3 of 7", "1", "0"]
    assert [bool(tile[0]) for tile in tiles] == [False, True, True, False]
    text = re.sub(r"\s+", " ", " ".join(Page(found).text))
    for fact in (
        "Made-up GPU (capability 9.0)", "copy 3 TB/s, matmul bfloat16 600 TFLOP/s, matmul float32 40 TFLOP/s",
        "torch 2.13.0, triton 3.7.1, transformers 5.23.0, python 3.11.2, cuda 12.9", "2026-11-20 12:00",
        "fastconv bench", "c0ffee" * 6 + "beef", "passed: 812",
    ):  # fmt: skip
        assert fact in text
    rows = Page(found)
    assert "other code or versions" in rows.row(slow["case"])[1]["case"]
    assert "other code or versions" not in rows.row(fast["case"])[1]["case"]
    assert "Liger 1x: not measured, missed" in rows.row(slow["case"])[1]["targets"]


NASTY = "<script>alert(1)</script> \"'>&amp; $\\frac{1}{2}$ -->"


def test_report_escapes_what_comes_from_a_file():
    records = [op_record("layer_norm", "BERT base", "infer", 1, length) for length in (32, 128, 512)]
    for record in records:
        for key in ("case", "op", "model"):
            record[key] = f"{record[key]} {NASTY}"
        record["broken"] = {f"Liger {NASTY}": NASTY}
        record["seconds"][NASTY], record["ratios"][NASTY] = record["seconds"]["torch"], record["ratios"]["torch"]
        record["targets"] = {NASTY: 1.0}
        record["peak_bytes"][NASTY] = 1000
    wrong = {**records[0], "case": f"wrong {NASTY}", "red": {NASTY: NASTY}}
    page = html_report.page(results(*records, wrong, device=NASTY, command=NASTY, tests=NASTY))
    found = Page(page)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert\(1\)&lt;/(<wbr>)?script&gt;", "", page)
    assert "".join(found.text).count(NASTY) > 20
    names = {attrs["id"] for tag, attrs in found.tags if tag == "figure"}
    assert len(names) == 5 and all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)


def test_report_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    html_report.write(RESULTS, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'No plots: plots need matplotlib, which is not installed: pip install "fastconv[bench]"' in html.unescape(
        page
    )
    assert "<svg" not in page and Page(page).row(SPAN)
    with pytest.raises(ImportError, match=r"pip install \"fastconv\[bench\]\""):
        plots.png(RESULTS, tmp_path / "plots")


# Plots


def drawn(*records, **other):
    found, missing = plots.plots(results(*records, **other))
    return {plot.name: plots.svg(plot) for plot in found}, missing


def titles(svg):
    return [html.unescape(title) for title in re.findall(r"<title>(.*?)</title>", svg)]


def lines(plot):
    """The points of every line of a plot's first panel, as drawn."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plot.panels[0].draw(axes, Marks())
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines]


def test_plots_speed_up_by_batch_and_length():
    records = [op_record("span_dynamic_conv", "ConvBERT base", "infer", *shape) for shape in SHAPES]
    found, missing = drawn(*records)
    svg = found["heat-span-dynamic-conv-infer-bfloat16-vs-hf"]
    assert "span_dynamic_conv infer ConvBERT base 8x512 bfloat16: 11.00x of HF (10.78 to 11.33)" in titles(svg)
    assert len(titles(svg)) == len(SHAPES)
    assert svg.count(">11x<") == 2 and svg.count(">4.08x<") == 1 and svg.count(">-<") == 2
    assert not any("copy" in name for name in found)

    # Over other rivals than the first: all if nobody has set a target, else those that a target names.
    def maps() -> list[str]:
        return [plot.name.rpartition("-vs-")[2] for plot in plots.plots(results(*records))[0] if plot.kind == "heat"]

    assert maps() == ["hf"]
    assert missing[-1].startswith("Speed-up by batch and length: some over torch compile, which are no case's first")
    records[0]["targets"]["torch compile"] = 1.5
    assert maps() == ["hf", "torch-compile"]
    for record in records:
        record["targets"] = {}
    assert maps() == ["hf", "torch-compile"]


def test_plots_keep_variants_of_an_op_apart():
    records = []
    for shape in ((1, 128), (8, 512), (1, 512)):
        for before, size in (("", 2.0), ("bias+residual+", 1.0)):
            record = op_record("layer_norm", "BERT base", "infer", *shape)
            record["case"] = f"{before}layer_norm infer {shape[0]}x{shape[1]} 768 bfloat16"
            record["ratios"]["torch"] = {"median": size, "low": size, "high": size}
            records.append(record)
    assert [variant(r) for r in records[:2]] == ["768", "bias+residual+layer_norm 768"]
    found, _ = plots.plots(results(*records))
    panels = {plot.name: [panel.title for panel in plot.panels] for plot in found}
    assert panels["heat-layer-norm-infer-bfloat16-vs-torch"] == [
        "BERT base, 768",
        "BERT base, bias+residual+layer_norm 768",
    ]
    assert panels["latency-layer-norm"] == ["inference: BERT base, 768, bfloat16, batch 1"]
    svg = next(plots.svg(plot) for plot in found if plot.name.endswith("vs-torch"))
    assert svg.count(">2.00x<") == svg.count(">1.00x<") == 3
    attention = {**records[0], "op": "masked_attention", "batch": 4, "length": 48, "lengths": "text"}
    attention["case"] = "lengths of masked_attention infer 4x48 text 4x48 bfloat16"
    assert variant(attention) == "lengths of masked_attention 4x48"
    model = {
        **model_record("ConvBERT base", "step", 8, 128),
        "case": "model step ConvBERT base MaskedLM 8x128 bfloat16",
    }
    assert variant(model) == "MaskedLM"


def test_plots_roofline():
    small, large = (op_record("layer_norm", "BERT base", "infer", *shape) for shape in ((1, 32), (64, 512)))
    found, _ = drawn(small, large, op_record("masked_attention", "BERT base", "step", 8, 512))
    marks = titles(found["roofline-bfloat16"])
    assert marks.count("roof: copy 3 TB/s") == marks.count("roof: matmul 600 TFLOP/s") == 2  # a panel a direction
    # By hand: 9 operations and 4 bytes an element are 2.25; the largest case of an op alone.
    (own,) = (mark for mark in marks if mark.startswith("fastconv: layer_norm"))
    rate = large["flops"] / large["seconds"]["fastconv"]["median"] / 1e12
    assert own == f"fastconv: {large['case']}: {rate:.3g} TFLOP/s, 2.25 FLOP/byte, 79 % of copy"
    assert any(mark.startswith(f"torch: {large['case']}: {rate / 1.9:.3g} TFLOP/s") for mark in marks)
    assert any(mark.startswith("HF: masked_attention step") for mark in marks)
    assert len(marks) == 2 * 2 + 2 * 2

    (plot,) = (plot for plot in plots.plots(results(small, large))[0] if plot.kind == "roofline")
    copies, products, between, theirs, ours = lines(plot)
    assert [y / x for x, y in copies] == pytest.approx([COPY / 1e12] * 2)  # bytes a second, of the FLOPs a byte
    assert [y for _, y in products] == [600, 600] and copies[1][0] == products[0][0] == 200
    assert ours == [(2.25, pytest.approx(rate))] and theirs == [(2.25, pytest.approx(rate / 1.9))]
    assert between == [*theirs, *ours]


def test_plots_latency_and_memory():
    records = [op_record("masked_attention", "BERT base", "infer", 1, length) for length in (512, 32, 128)]
    records += [op_record("masked_attention", "BERT base", "infer", 8, length) for length in (128, 512)]
    records[0]["peak_bytes"]["SDPA flash"] = None  # could not be measured
    records[1]["peak_bytes"]["matmul"] = 1000  # it computes something else
    found, _ = drawn(*records)
    latency = titles(found["latency-masked-attention"])
    seconds = {r["length"]: 1e6 * r["seconds"]["HF"]["median"] for r in records[:3]}
    assert "HF, by length: " + ", ".join(f"{x}: {seconds[x]:.3g} us" for x in (32, 128, 512)) in latency
    labels = [title.partition(", by")[0] for title in latency]
    own = ["fastconv", "HF", "SDPA flash"]
    assert sorted(labels) == sorted([*own, *(f"{label}, graph replay" for label in own)])
    memory = titles(found["memory-masked-attention"])
    assert not any(title.startswith("matmul") for title in memory)
    assert "fastconv, by length: 32: 0.0492 MB, 128: 0.197 MB, 512: 0.786 MB" in memory
    assert "SDPA flash, by length: 32: 0.0482 MB, 128: 0.193 MB" in memory
    assert "inference: BERT base, bfloat16, batch 1" in found["memory-masked-attention"]


def test_plots_of_models_mark_targets():
    record = model_record("ConvBERT base", "infer", 32, 512, "text")
    found, _ = drawn(record)
    marks = titles(found["tokens-convbert-base"])
    assert f"{record['case']}: target 1.8x HF, reached" in marks
    assert f"{record['case']}: target 1.3x HF compile, missed" in marks
    assert f"{record['case']}: target 3x HF / fastconv remove, reached" in marks
    bars = [mark for mark in marks if mark.endswith("tokens/s")]
    assert len(bars) == 6 and not any("matmul" in bar for bar in bars)
    rates = record["tokens_per_s"]
    assert f"{record['case']}, HF: {rates['HF']:,.0f} tokens/s" in bars
    (plot,) = (plot for plot in plots.plots(results(record))[0] if plot.kind == "tokens")
    strokes = [(x, (low + high) / 2) for (x, low), (_, high) in lines(plot)]
    row = {label: index for index, label in enumerate(rates)}
    wanted = [(1.8, "HF", "fastconv"), (1.3, "HF compile", "fastconv"), (3.0, "HF", "fastconv remove")]
    assert strokes == [(pytest.approx(goal * rates[slow]), row[fast]) for goal, slow, fast in wanted]


def test_plots_of_models_show_the_cases_that_tell_most():
    few = [model_record("ConvBERT base", "infer", batch, 128) for batch in range(1, 11)]
    many = [model_record("BERT base", "infer", batch, length) for length in (32, 512) for batch in range(1, 9)]
    for record in many:
        record["targets"] = {"HF": 1.8} if record["batch"] == 5 or record["case"].endswith(" 3x32 bfloat16") else {}
    of_few, of_many = (plot for plot in plots.plots(results(*few, *many))[0] if plot.kind == "tokens")
    assert of_few.panels[0].title == "inference, bfloat16"
    assert of_few.title == "ConvBERT base: tokens a second"
    assert of_many.panels[0].title == "inference, bfloat16: 7 of 16 cases"
    assert of_many.title.startswith("BERT base: tokens a second\nof many cases those with targets, then of each")
    shown = {title.partition(",")[0] for title in titles(plots.svg(of_many)) if title.endswith("tokens/s")}
    shapes = ("1x32", "3x32", "5x32", "8x32", "1x512", "5x512", "8x512")
    assert shown == {f"model infer BERT base {shape} bfloat16" for shape in shapes}


def test_plots_without_data_are_left_out_in_words():
    one = op_record("layer_norm", "BERT base", "infer", 8, 512)
    found, missing = drawn(one)
    assert list(found) == ["roofline-bfloat16"]
    assert missing == [
        "Tokens a second: no whole model was measured",
        "Speed-up by batch and length: left out for layer_norm: no rival was timed on three shapes of one model",
        "Latency of batch 1: left out for layer_norm: batch 1 was not measured at two lengths",
        "Peak memory by length: left out for layer_norm: peaks are not known at two lengths of one batch",
    ]
    assert "Plots left out" in html_report.page(results(one))
    found, missing = drawn(one, roofs=None)
    assert not found and "Roofline: left out, the results have no roofs" in missing
    found, missing = drawn(RESULTS["records"][RED])
    assert not found and len(missing) == 5
    shapeless = {**one, "batch": None, "length": None, "model": None, "peak_bytes": {"fastconv": None}}
    assert list(drawn(shapeless, {**shapeless, "case": "two"})[0]) == ["roofline-bfloat16"]


def test_plots_are_the_same_every_time_and_share_no_ids():
    records = [op_record("layer_norm", "BERT base", "infer", *shape) for shape in SHAPES]
    found, again = drawn(*records)[0], drawn(*records)[0]
    assert found == again and len(found) == 4
    ids = [found_id for svg in found.values() for found_id in re.findall(r'\bid="(.*?)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in found.values():
        assert set(re.findall(r'(?:url\(#|href="#)([^")]*)', svg)) <= set(ids)
        assert "Made-up GPU · torch 2.13.0, triton 3.7.1, transformers 5.23.0, cuda 12.9 · 2026-11-20" in svg
        assert "var(--ink)" in svg and plots.COLORS["ink"][0] not in svg


def test_plots_png(tmp_path):
    import numpy as np
    from matplotlib.image import imread

    chosen = results(
        model_record("ConvBERT base", "infer", 8, 512), op_record("layer_norm", "BERT base", "infer", 8, 512)
    )
    written = plots.png(chosen, tmp_path / "new" / "folder")
    names = ["tokens-convbert-base.png", "roofline-bfloat16.png"]
    assert [path.name for path in written] == names == sorted((p.name for p in written), reverse=True)
    first = {path: path.read_bytes() for path in written}
    for path in written:
        picture = imread(path)
        assert picture.shape[1] > 800 and np.unique(picture.reshape(-1, picture.shape[2]), axis=0).shape[0] > 50
    assert {path: path.read_bytes() for path in plots.png(chosen, tmp_path / "new" / "folder")} == first
    assert plots.png(chosen, tmp_path, names=["roofline-bfloat16"]) == [tmp_path / "roofline-bfloat16.png"]
    with pytest.raises(ValueError, match="no data for the plots nothing; there are tokens-convbert-base, roofline-bf"):
        plots.png(chosen, tmp_path, names=["roofline-bfloat16", "nothing"])


def test_report_of_a_whole_gpu_is_short_enough_to_read(undrawn):
    every = full_plan()
    found = DRAWN(every)[0]
    assert len(found) < 140
    assert max(sum(panel.height for panel in plot.panels) for plot in found) < 26  # inches, of which a phone shows 10
    (largest,) = (plot for plot in found if plot.name == "roofline-bfloat16")
    assert len(plots.svg(largest)) < 1.2e5
    assert len(html_report.page(every)) < 2.5e6


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")

# Shows the report as on a phone and writes down what the browser made of it.
PHONE = """<!DOCTYPE html><body style="margin:0">
<iframe src="report.html" style="width:390px;height:1200px;border:0"></iframe><pre id="found"></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, seen = {};
  const filter = page.querySelector("form.filter"), words = filter.querySelector("input");
  const change = (element, value) => {
    element.value = value;
    element.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const folded = () => [...page.querySelectorAll("details.cases")].filter((part) => !part.open).length;
  seen.folded = [folded()];
  change(words, "layer_norm 8x512");
  seen.folded.push(folded());
  change(words, "");
  for (const part of page.querySelectorAll("details")) part.open = true;
  seen.width = [page.documentElement.scrollWidth, page.documentElement.clientWidth];
  seen.plots = {};
  for (const plot of page.querySelectorAll("figure")) {
    const marks = [...plot.querySelectorAll("g.mark")].map((mark) => mark.getBBox());
    const at = plot.querySelector("svg").getBoundingClientRect();
    const texts = [...plot.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
    seen.plots[plot.id] = {
      size: [at.width, at.height], marks: marks.length,
      empty: marks.filter((box) => !(Math.max(box.width, box.height) > 1)).length,
      outside: texts.filter((text) => text.left < at.left - 1 || text.right > at.right + 1).length,
    };
  }
  const shown = (row) => row.offsetHeight > 0;
  const cases = () => [...page.querySelectorAll("tr.case")].filter(shown).map((row) => row.dataset.case);
  seen.all = cases().length;
  change(words, "Attention 8x512");
  seen.filtered = cases();
  change(filter.querySelector("select"), "red");
  seen.red = cases();
  change(filter.querySelector("select"), "");
  change(words, "layer_norm infer bert 512");
  const table = page.querySelector("#of-layer-norm table");
  const head = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === "ms");
  head.firstChild.click();
  seen.slowest_first = cases();
  head.firstChild.click();
  seen.fastest_first = cases();
  document.querySelector("#found").textContent = JSON.stringify(seen);
};
</script>"""


def chromium(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Run Chromium without a window, a network or a profile."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--window-size=500,1300",
        "--virtual-time-budget=5000", *options,
    ]  # fmt: skip
    done = subprocess.run([*command, f"file://{folder / 'phone.html'}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def opened(folder: Path, page: str) -> tuple[dict, list[str]]:
    """What the browser made of a report, and the errors in its console."""
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "phone.html").write_text(PHONE, encoding="utf-8")
    done = chromium(folder, "--dump-dom")
    seen = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(seen[1]) or "{}"), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@browser
def test_report_in_a_browser_on_a_phone(tmp_path, page):
    seen, console = opened(tmp_path, page)
    assert console == []
    # Without it a phone would show the page as on a wide screen, and tiny.
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in Page(page).tags
    assert seen["width"] == [390, 390]
    figures = {f"plot-{plot.name}" for plot in plots.plots(RESULTS)[0]}
    assert set(seen["plots"]) == figures and len(figures) > 20
    for name, plot in seen["plots"].items():
        assert plot["size"][0] > 300 and plot["size"][1] > 100, name
        assert plot["marks"] >= 2 and plot["empty"] == plot["outside"] == 0, (name, plot)

    assert seen["folded"] == [2, 1]  # of layer_norm and masked_attention; what a filter finds unfolds
    assert seen["all"] == len(RESULTS["records"])
    assert len(seen["filtered"]) == 4 and all("attention" in case and "8x512" in case for case in seen["filtered"])
    assert seen["red"] == [RED.lower()]
    for order, descending in (("slowest_first", True), ("fastest_first", False)):
        times = [RESULTS["records"][case]["seconds"]["fastconv"]["median"] for case in by_name(seen[order])]
        assert len(set(times)) >= 3 and times == sorted(times, reverse=descending)

    chromium(tmp_path, f"--screenshot={tmp_path / 'phone.png'}")
    from matplotlib.image import imread

    assert 0.005 < (imread(tmp_path / "phone.png")[:, :390, :3].min(axis=2) < 0.7).mean() < 0.7  # ink on paper


def by_name(lower):
    names = {case.lower(): case for case in RESULTS["records"]}
    return [names[case] for case in lower]


@browser
def test_what_the_browser_says_of_a_bad_report(tmp_path, undrawn):
    planted = """<script>throw new Error("planted")</script><img src="https://example.invalid/a.png">
        <div style="width:500px">wide</div><figure id=bad><svg viewBox="0 0 9 9"><g class=mark></g></svg></figure>"""
    seen, console = opened(tmp_path, html_report.page(RESULTS).replace("</main>", f"{planted}</main>"))
    assert any("script" in line and "Content Security Policy" in line for line in console)
    assert any("https://example.invalid/a.png" in line for line in console)
    assert seen["width"][0] > 390
    assert seen["plots"]["bad"]["empty"] == 1


@browser
def test_a_script_error_of_the_report_shows(tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(html_report, "SCRIPT", html_report.SCRIPT + "\nundefined.planted;")
    _, console = opened(tmp_path, html_report.page(RESULTS))
    assert any("planted" in line for line in console)
