"""The ahead-of-time gate: compiles every Triton kernel for every launch config, for four GPUs, without a GPU.

    python tests/aot.py [--targets sm_90,gfx942] [--dtypes bfloat16] [--full] [--json FILE]

It finds the kernels by itself: every module of fastconv.kernels that defines a `..._kernel` must have a generator
`launches(dtype, device)` that makes every launch that its `pick_config` can choose. Here these launches are recorded
instead of run, on tensors of the meta device and after Triton's own JIT has specialised their arguments (types,
constants, multiples of 16), so that what is compiled is what a GPU would run.

It fails on
- a kernel that no launch covers, or that does not compile;
- a spill: stack, local memory or scratch in the machine code (an empty frame, which nothing uses, is none);
- more shared memory, registers or threads than the GPU gives a block;
- a load or store that should move 16 bytes an instruction and doesn't: one of a tile with at least 16 bytes for
  every thread, through a pointer that is a multiple of 16 (as torch's are). A module that can't do better for an
  argument says so: NARROW = {"_the_kernel": {"the_ptr": "reason"}};
- a matrix product without matrix instructions, or on sm_90 without wgmma where its tile allows it.

bf16 and fp32 are compiled for every target, fp16 for sm_90 alone: it differs from bf16 in the conversions only.
Memory instructions are counted in the PTX or AMD assembly; the machine code of the launch with the most registers of
each kernel, target and dtype is disassembled to confirm them (--full: of every launch).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

# A kernel decides at its definition whether it is interpreted; Triton 3.10 changes the default of fusion to off.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from aot_inspect import (
    Resources,
    accesses,
    amd_resources,
    cubin_resources,
    dots,
    instructions,
    matrix_instructions,
    sass_instructions,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastconv.kernels._launch import Card


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, with what launchers ask of it and what it gives a block."""

    name: str
    gpu: GPUTarget
    capability: int
    sm_count: int
    shared: int  # bytes of shared memory that a block can have

    @property
    def card(self) -> Card:
        """What launch configs know of it. No table has an entry for such a name: rules are what is compiled."""
        return Card(self.name, self.capability, self.shared)

    @property
    def amd(self) -> bool:
        return self.gpu.backend == "hip"


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 80, 108, 163 * 1024),  # A100
        Target("sm_90", GPUTarget("cuda", 90, 32), 90, 132, 227 * 1024),  # H100, H200
        Target("sm_100", GPUTarget("cuda", 100, 32), 100, 148, 227 * 1024),  # B200
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 94, 304, 64 * 1024),  # MI300X
    )
}
_DTYPES = ("bfloat16", "float32", "float16")
_MAX_THREADS = 1024
# ptxas of triton 3.9 reserves a frame of 8 bytes that no instruction uses, where in the end it keeps predicates in a
# register. Such a frame counts only if the machine code has an access to local memory.
_FRAME = 8
_REGISTERS = 64 * 1024  # of a multiprocessor of NVIDIA's; AMD's register files are not shared by the waves of a block


def dtypes(target: Target) -> tuple[torch.dtype, ...]:
    """What is compiled for a target; see the module's docstring."""
    both = (torch.bfloat16, torch.float32)
    return (*both, torch.float16) if target.name == "sm_90" else both


@dataclass
class Launch:
    """One launch as Triton's JIT would compile it."""

    kernel: JITFunction
    name: str
    dtype: torch.dtype
    target: Target
    signature: dict[str, str]
    constants: dict
    attributes: dict
    options: Any
    narrow: dict[str, str]


@dataclass
class Result:
    """What a launch compiles to."""

    kernel: str
    launch: str
    dtype: str
    target: str
    warps: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    loads: dict[int, int] = field(default_factory=dict)  # bytes an instruction -> how many
    stores: dict[int, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    cubin: str = ""


class _Recorder:
    """Stands in for Triton's driver and for the compilation, so that a launch only leaves a note."""

    def __init__(self) -> None:
        self.launches: dict[tuple, Launch] = {}
        self.target: Target
        self.dtype: torch.dtype
        self.new: list[Launch] = []
        self.kernels: set[str] = set()

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> str:
        return self.target.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def note(self, kernel, key, signature, device, constants, options, attributes, warmup) -> None:
        self.kernels.add(kernel.fn.__qualname__)
        unique = (kernel.fn, self.target.name, key)
        if unique not in self.launches:
            narrow = getattr(sys.modules[kernel.fn.__module__], "NARROW", {}).get(kernel.fn.__qualname__, {})
            launch = Launch(kernel, "", self.dtype, self.target, signature, constants, attributes, options, narrow)
            self.launches[unique] = launch
            self.new.append(launch)


@contextlib.contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    def note(self, *args, **kwargs):
        recorder.note(self, *args, **kwargs)

    # What launchers ask about the GPU.
    answers = {
        "sm_count": lambda x: recorder.target.sm_count,
        "card": lambda x: recorder.target.card,
        "is_amd": lambda: recorder.target.amd,
    }
    with (
        mock.patch.object(JITFunction, "_do_compile", note),
        mock.patch.object(driver, "_active", recorder),
        mock.patch.multiple("fastconv.kernels._launch", **answers),
    ):
        yield


def record(modules: list[ModuleType], targets: list[Target]) -> tuple[list[Launch], list[str]]:
    """Every different launch of the modules for the targets, and the problems of modules that leave a kernel out."""
    recorder, problems = _Recorder(), []
    with _recording(recorder):
        for module in modules:
            kernels = [
                name
                for name, value in vars(module).items()
                if name.endswith("_kernel")
                and isinstance(value, JITFunction)
                and value.fn.__module__ == module.__name__
            ]
            if kernels and not hasattr(module, "launches"):
                problems.append(f"{module.__name__} has kernels ({', '.join(kernels)}) but no launches(dtype, device)")
                continue
            for target, dtype in [(t, d) for t in targets for d in dtypes(t)] if kernels else ():
                recorder.target, recorder.dtype = target, dtype
                for name in module.launches(dtype, torch.device("meta")):
                    for launch in recorder.new:
                        launch.name = name
                    recorder.new = []
            problems += [
                f"{module.__name__}.{name} is not launched by launches(dtype, device)"
                for name in kernels
                if name not in recorder.kernels
            ]
    return list(recorder.launches.values()), problems


def _compile(launch: Launch, cubin_dir: Path, number: int) -> Result:
    dtype = str(launch.dtype).removeprefix("torch.")
    result = Result(launch.kernel.fn.__qualname__, launch.name, dtype, launch.target.name, launch.options.num_warps)
    try:
        source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        compiled = triton.compile(source, target=launch.target.gpu, options=launch.options.__dict__)
    except Exception as error:  # whatever a compiler pass raises is the finding
        why = " ".join(f"{error} {error.__cause__ or ''}".split())
        result.problems.append(f"does not compile: {type(error).__name__}: {why[:300]}")
        return result
    amd = launch.target.amd
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    if amd:
        resources = amd_resources(assembly)
    else:
        cubin = cubin_dir / f"{number}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        result.cubin = str(cubin)
        resources = cubin_resources(cubin)
        if 0 < resources.stack <= _FRAME and not sass_instructions(cubin)["local", 0]:
            resources = Resources(resources.registers, 0)
    _fill(result, launch, compiled.asm["ttir"], assembly, resources, compiled.metadata.shared)
    return result


def _fill(result: Result, launch: Launch, ttir: str, assembly: str, resources: Resources, shared: int) -> None:
    found = instructions(assembly, launch.target.amd)
    total: Counter[tuple[str, int]] = sum(found.values(), Counter())
    result.registers, result.stack, result.shared = resources.registers, resources.stack, shared
    result.loads = {size: n for (kind, size), n in sorted(total.items()) if kind == "load"}
    result.stores = {size: n for (kind, size), n in sorted(total.items()) if kind == "store"}
    result.matrix = matrix_instructions(assembly)

    threads = launch.options.num_warps * launch.target.gpu.warp_size
    if result.stack:
        result.problems.append(f"spills {result.stack} bytes a thread")
    if shared > launch.target.shared:
        result.problems.append(f"needs {shared} bytes of shared memory, a block gets {launch.target.shared}")
    if not launch.target.amd and result.registers * threads > _REGISTERS:
        result.problems.append(f"needs {threads} times {result.registers} registers, a block gets {_REGISTERS}")
    if threads > _MAX_THREADS:
        result.problems.append(f"needs {threads} threads, a block gets {_MAX_THREADS}")
    result.problems += _narrow(ttir, found, threads, launch.narrow)
    for dot in dots(ttir):
        exact = dot.dtype in ("f32", "f64") and not dot.tf32
        if not exact and not result.matrix:
            result.problems.append(f"a {dot.m}x{dot.k} @ {dot.k}x{dot.n} product without matrix instructions")
        wide = dot.dtype in ("f16", "bf16") and dot.m >= 64 and launch.options.num_warps >= 4
        if launch.target.name == "sm_90" and wide and "wgmma" not in result.matrix:
            result.problems.append(f"a {dot.m}x{dot.k} @ {dot.k}x{dot.n} product without wgmma")


def _narrow(ttir: str, found: dict, threads: int, exempt: dict[str, str]) -> list[str]:
    """The accesses that should move 16 bytes an instruction and don't."""
    tiles = accesses(ttir)
    # A helper's access can have several callers, one location: it has to be wide only if it has to for all of them.
    small = {a.location for a in tiles if not a.must_be_wide(threads)}
    problems = []
    for access in tiles:
        if access.location in small or access.pointer in exempt:
            continue
        sizes = {size for kind, size in found.get(access.location, ()) if kind == access.kind}
        if not sizes or min(sizes) < 16:
            file, line, _ = access.location
            how = f"in {min(sizes)}-byte instructions" if sizes else "by no instruction that can be found"
            tile = "x".join(map(str, access.shape))
            problems.append(
                f"{access.kind} of {access.pointer or '?'} at {file}:{line} ({tile} values of {access.element_bytes} "
                f"bytes, {threads} threads) moves {how}, not 16"
            )
    return problems


def _confirm(result: Result) -> list[str]:
    """Problems that only the machine code shows."""
    sass = sass_instructions(Path(result.cubin))
    problems = []
    if sass["local", 0] and not result.stack:
        problems.append(f"spills: {sass['local', 0]} accesses to local memory")
    for kind, counted in (("load", result.loads), ("store", result.stores)):
        sizes = {size for k, size in sass if k == kind}
        if min(counted, default=0) >= 16 > min(sizes, default=16):
            problems.append(f"{kind}s are 16 bytes in the PTX but {min(sizes)} in the machine code")
    return problems


# Workers are forked: they find the launches here, since a launch holds what can't be pickled.
_shared = SimpleNamespace(launches=[], cubin_dir=Path())


def _compile_number(number: int) -> Result:
    return _compile(_shared.launches[number], _shared.cubin_dir, number)


def compile_all(launches: list[Launch], *, disassemble_all: bool, jobs: int) -> list[Result]:
    """Compile and judge every launch, on all cores, without leaving anything in the user's Triton cache."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=f"{folder}/cache"):
        _shared.launches, _shared.cubin_dir = launches, Path(folder)
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
            results = list(pool.map(_compile_number, range(len(launches)), chunksize=4))
            chosen = {
                (r.kernel, r.target, r.dtype, i if disassemble_all else 0): r
                for i, r in sorted(enumerate(results), key=lambda pair: pair[1].registers)
                if r.cubin
            }
            for result, problems in zip(chosen.values(), pool.map(_confirm, chosen.values()), strict=True):
                result.problems += problems
    return results


def _row(results: list[Result]) -> dict[str, object]:
    """One line of the table: the largest values of some launches."""

    def split(which: str) -> str:
        total: Counter[int] = sum((Counter(getattr(r, which)) for r in results), Counter())
        wide = sum(n for size, n in total.items() if size >= 16)
        return f"{wide}/{sum(total.values())}"

    matrix = {kind for r in results for kind in r.matrix}
    warps = sorted({r.warps for r in results})
    return {
        "kernel": results[0].kernel,
        "target": results[0].target,
        "dtype": results[0].dtype,
        "launches": len(results),
        "warps": f"{warps[0]}" if len(warps) == 1 else f"{warps[0]}-{warps[-1]}",
        "registers": max(r.registers for r in results),
        "stack": max(r.stack for r in results),
        "shared": max(r.shared for r in results),
        "16B loads": split("loads"),
        "16B stores": split("stores"),
        "matrix": ",".join(sorted(matrix)) or "-",
        "problems": sum(bool(r.problems) for r in results) or "-",
    }


def table(results: list[Result], *, full: bool) -> str:
    """A row for every kernel, target and dtype with its worst launch's figures, or with `full` for every launch."""
    groups: dict[tuple, list[Result]] = {}
    for i, r in enumerate(results):
        groups.setdefault((r.kernel, r.target, r.dtype, i if full else 0), []).append(r)
    rows = [_row(group) for _, group in sorted(groups.items())]
    if full:
        for row, (_, group) in zip(rows, sorted(groups.items()), strict=True):
            row["launches"] = group[0].launch
    lines = [[str(v) for v in row.values()] for row in rows]
    header = list(rows[0])
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    return "\n".join(
        "  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in [header, *lines]
    )


def _summed_up(results: list[Result]) -> list[str]:
    """Each problem once for all the launches of a kernel that have it, with the first of them."""
    launches: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        for problem in r.problems:
            launches.setdefault((r.kernel, r.target, problem), []).append(r)
    lines = []
    for (kernel, target, problem), found in launches.items():
        first = f"{found[0].dtype} {found[0].launch}, {found[0].warps} warps"
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(f"{kernel} {target} [{first}{others}] {problem}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of: %(default)s")
    parser.add_argument("--dtypes", default=",".join(_DTYPES), help="comma-separated, of: %(default)s")
    parser.add_argument("--package", default="fastconv.kernels", help="the package of kernels (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="a row for every launch, and disassemble every launch")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every launch's figures")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for kind, given, known in (("target", args.targets, TARGETS), ("dtype", args.dtypes, _DTYPES)):
        unknown = set(given.split(",")) - set(known)
        if unknown:
            parser.error(f"unknown {kind} {', '.join(sorted(unknown))}: expected some of {','.join(known)}")

    start = time.perf_counter()
    package = importlib.import_module(args.package)
    names = [m.name for m in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{args.package}.{name}") for name in names]
    launches, missing = record(modules, [TARGETS[name] for name in args.targets.split(",")])
    launches = [launch for launch in launches if str(launch.dtype).removeprefix("torch.") in args.dtypes.split(",")]
    results = compile_all(launches, disassemble_all=args.full, jobs=args.jobs)
    problems = missing + _summed_up(results)
    if not launches:
        problems.append(f"{args.package} has no kernel to compile")
    else:
        print(table(results, full=args.full))
    for problem in problems:
        print(f"FAIL {problem}")
    if args.json:
        figures = [{k: v for k, v in asdict(r).items() if k != "cubin"} for r in results]
        args.json.write_text(
            json.dumps({"triton": triton.__version__, "problems": problems, "launches": figures}, indent=1)
        )
    spills = sum(r.stack > 0 for r in results)
    print(
        f"aot, triton {triton.__version__}: {len(results)} launches of {len({r.kernel for r in results})} kernels for "
        f"{args.targets}: {spills} spill, {len(problems)} problems, {time.perf_counter() - start:.0f} s: "
        f"{'FAIL' if problems else 'PASS'}"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
