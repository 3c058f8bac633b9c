"""README.md: its figures are those of the results files, and what it links to exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from made_results import full_plan

from fastconv.bench import readme, results
from fastconv.parity.results import Verification

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` writes new results while it tests")

PAGE = readme.README.read_text(encoding="utf-8")


def test_readme_figures_are_those_of_the_results():
    assert list(readme.differences(PAGE)) == []


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_readme_a_changed_figure_is_told(name, capsys, monkeypatch, tmp_path):
    block = next(
        block
        for block in re.finditer(r"<!-- figures: ([\w-]+) -->\n.*?<!-- end -->", PAGE, re.DOTALL)
        if block[1] == name
    )
    figure = re.search(r"\d", block[0].partition("\n")[2])
    at = block.start() + len(block[0].partition("\n")[0]) + 1 + figure.start()
    changed = PAGE[:at] + str((int(PAGE[at]) + 1) % 10) + PAGE[at + 1 :]
    assert list(readme.differences(changed)) == [name]
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme, "draw", lambda: None)  # the pictures are the checkout's
    readme.README.write_text(changed, encoding="utf-8")
    assert readme.main(["--check"]) == 1
    assert f"the figures of {name!r}" in capsys.readouterr().err
    assert readme.main([]) == 0
    assert readme.README.read_text(encoding="utf-8") == PAGE


def test_readme_a_lost_block_is_told():
    name = next(iter(readme.BLOCKS))
    assert list(readme.differences(PAGE.replace(f"<!-- figures: {name} -->", ""))) == [name]


def test_readme_plots_are_of_the_results():
    image = pytest.importorskip("PIL.Image", reason="reads PNGs by Pillow, which matplotlib brings")
    for path, found in readme._measured():
        pictures = list(path.with_suffix("").glob("*.png"))
        assert pictures and {image.open(each).text["Source"] for each in pictures} == {results.digest(found)}


def test_readme_of_a_gpu_shows_the_cases_that_tell_most(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    owed = readme.owed()
    every = full_plan()
    first = next(iter(every["records"].values()))
    first["red"] = {"y": "max error nan"}
    results.save(tmp_path / "gpu.json", every)
    page = readme.bench()
    shown = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines()[2:] if line.startswith("| ")]
    assert 50 <= len(shown) <= 70 and first["case"] not in shown
    of_ops = [case.startswith("model ") for case in shown].index(False)
    assert 30 < of_ops < 40 and not any(case.startswith("model ") for case in shown[of_ops:])
    for case, there in {
        "model infer ConvBERT base 1x128 bfloat16": True,
        "model step ConvBERT base SequenceClassification 1x128 bfloat16": False,
        "model step BERT large SequenceClassification 64x512 bfloat16": True,
        "model infer ConvBERT base 64x512 text bfloat16": True,
        "model infer BERT base 64x512 text bfloat16": False,
        "model infer BERT base 8x512 float16": False,
        "model infer BERT base 16x512 bfloat16": False,
        "conv_branch step 8x512 6x64 k9 bfloat16": True,
        "conv_branch step 8x512 text 6x64 k9 bfloat16": False,
        "conv_branch fwd 64x512 6x64 k9 bfloat16": False,
    }.items():
        assert case in every["records"] and (case in shown) == there, case
    goals = [(r, name, goal) for r in every["records"].values() for name, goal in r["targets"].items()]
    reached = sum(name in r["ratios"] and goal <= 2 for r, name, goal in goals)
    assert f"({reached} of the {len(goals)} targets of all cases are reached)" in page
    assert "SDPA flash 1x" in owed and "SDPA flash 1x" not in readme.owed()


def test_readme_links_to_files_that_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert links, "the plots at least"
    assert [link for link in links if not (readme.README.parent / link).exists()] == []


@pytest.mark.parametrize("run", readme.VERIFIED, ids=lambda run: run.name)
def test_readme_verifications_survive_their_file(run):
    kept = json.loads(run.file.read_text(encoding="utf-8"))
    again = Verification.from_dict(kept).to_dict()
    assert {**again, "command": kept["command"]} == kept
    assert not Path(kept["model"]).is_absolute()
