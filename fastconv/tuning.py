"""tune: search launch configs for one card and somebody's shapes, and write those that win into a table.

A model says which kernels it launches on which shapes. For each of them every candidate that its kernel proposes is
checked against the reference in fp64 by the 2x rule, with its gradients, and only then timed, interleaved with the
config that is used without the user's table. One wins that is faster beyond the spread, and by more than 2 %. The table
is written after every shape, so that a search can be stopped at any time, and goes on where it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn

from fastconv import dispatch, models, tuning_cases
from fastconv.bench.case import ends
from fastconv.bench.provenance import now
from fastconv.bench.timing import interleaved, ratio
from fastconv.kernels import _configs
from fastconv.kernels._configs import Asked, Key
from fastconv.parity import subjects
from fastconv.swap import accelerate
from fastconv.tolerance import compare, exact_convolutions
from fastconv.tuning_cases import Case

# Called with what is done next, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]
Timer = Callable[..., dict[str, list[float]]]

# A candidate has to be this much faster: less is not worth another kernel in the cache.
_GAIN = 1.02
# All candidates a few times, then the fastest often enough for a spread.
_ROUNDS, _FINAL_ROUNDS, _FINALISTS = 10, 50, 4


class TuningError(RuntimeError):
    """What stops a search: the table can't be read or written, or the GPU doesn't answer any more."""


@dataclass(frozen=True)
class Searched:
    """What the search found for one kernel and shape.

    before: the config without the user's table; after: what won, or None
    seconds: of both, the medians
    rejected: why candidates were not timed -> how many
    red: why nothing was timed at all: the config that is in use is wrong here
    """

    asked: Asked
    before: Any
    after: Any
    seconds: tuple[float, float] | None
    tried: int
    rejected: Mapping[str, int]
    red: str | None = None


def model_of(name: str, length: int) -> nn.Module:
    """A model of one layer as that of a checkpoint folder or of a published shape is, in fp32 on the CPU.

    name: as in `fastconv verify`; the weights don't matter, every layer has the same shapes

    Raises: what `fastconv.parity.subjects.one_layer` raises; ValueError for a length that it has no positions for.
    """
    class_name, config = subjects.one_layer(name)
    if length > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"length must be at most {most}, which is all that {name} takes, got {length}")
    return getattr(models, class_name)(config)


def asked_for(
    model: nn.Module, *, batch: int, length: int, direction: str, padding: str = "keep"
) -> dict[tuple[str, Key], Asked]:
    """What an accelerated copy of a model asks for on a batch of full sequences: what it says of each, once.

    model: of fastconv.models or transformers, on the device and in the dtype that it will have; it is changed
    """
    accelerate(model, padding=padding)
    found: dict[tuple[str, Key], Asked] = {}
    with _configs.watched() as asked:
        for training in {"infer": (False,), "train": (True,), "both": (False, True)}[direction]:
            _run(model.train(training), batch, length, masked=padding == "remove")
    for each in asked:
        found.setdefault(_identity(each), each)
    return found


def _run(model: Any, batch: int, length: int, *, masked: bool) -> None:
    config, device = model.config, next(model.parameters()).device
    # Any token but padding, of which transformers warns.
    call: dict[str, Any] = {"input_ids": torch.full((batch, length), int(config.pad_token_id == 0), device=device)}
    if masked:
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    if config.model_type == "roc_bert":
        call |= {name: torch.zeros_like(call["input_ids"]) for name in ("input_shape_ids", "input_pronunciation_ids")}
    if type(model).__name__.endswith("ForMultipleChoice"):
        call = {name: tensor[:, None] for name, tensor in call.items()}
    if not model.training:
        with torch.inference_mode():
            model(**call)
        return
    if type(model).__name__.endswith("ForMaskedLM"):
        call |= {"labels": call["input_ids"], "loss_only": True}
    with torch.enable_grad():
        output = model(**call)
        found = [t.float().mean() for t in output.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    torch.autograd.grad(torch.stack(found).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _identity(asked: Asked) -> tuple[str, Key]:
    """The minor version of triton, and the key of an entry for it."""
    kernel = _configs.KERNELS[asked.kernel]
    return _configs.minor(triton.__version__), _configs.key_of(kernel, asked.shape, asked.dtype, asked.card)


class Search:
    """A search for the best configs of what was asked for, into the table at `path`.

    command: how it was started, for the entries
    again: also what the table has an entry for
    device: where the kernels run

    Raises: TuningError for a file that is no table.
    """

    def __init__(
        self,
        asked: Iterable[Asked],
        path: Path,
        device: torch.device,
        *,
        command: str,
        again: bool = False,
        timer: Timer = interleaved,
    ) -> None:
        self._path, self._device, self._command, self._timer = path, device, command, timer
        _configs.all_kernels()
        self._entries = _read(path)
        done = set() if again else set(self._entries)
        found = {_identity(each): each for each in asked}
        self.done = [each for identity, each in found.items() if identity in done]
        self.todo = [each for identity, each in found.items() if identity not in done]

    def candidates(self, asked: Asked) -> list[Any]:
        """What is tried beside the config that is used without the user's table."""
        kernel = _configs.KERNELS[asked.kernel]
        before = _configs.without_user_table(*asked)
        around = kernel.candidates(asked.shape, asked.dtype, asked.card)
        return [config for config in around if config != before]

    def run(self, *, seconds: float | None = None, progress: Progress | None = None) -> Iterator[Searched]:
        """Search what is to do, shape by shape, until so many seconds are over; what is begun then is not kept."""
        budget = _Budget(seconds, sum(len(self.candidates(each)) + 1 for each in self.todo), progress)
        for asked in self.todo:
            try:
                found = self._search(asked, budget)
            except _OutOfTimeError:
                return
            if found.red is None:
                self._keep(found)
            yield found

    def _search(self, asked: Asked, budget: _Budget) -> Searched:
        before, candidates = _configs.without_user_table(*asked), self.candidates(asked)
        name = f"{asked.kernel} {'x'.join(map(str, asked.shape))}"
        case = tuning_cases.make(asked, self._device)
        judge = _Judge(asked.kernel, case)
        budget.step(f"{name}: what is used now")
        red = judge.problem(before)
        if red is not None:
            budget.skip(len(candidates))
            return Searched(asked, before, None, None, 0, {}, red)
        rejected: dict[str, int] = {}
        right = []
        for number, config in enumerate(candidates, 1):
            budget.step(f"{name}: candidate {number} of {len(candidates)}")
            problem = judge.problem(config)
            if problem is None:
                right.append(config)
            else:
                rejected[problem] = rejected.get(problem, 0) + 1
        after, times = self._fastest(asked.kernel, case, before, right)
        return Searched(asked, before, after, times, len(candidates), rejected)

    def _fastest(
        self, kernel: str, case: Case, before: Any, candidates: Sequence[Any]
    ) -> tuple[Any, tuple[float, float]]:
        """The candidate that is surely faster, or None, and the seconds of what is used now and of it."""

        def times(configs: Sequence[Any], rounds: int) -> list[list[float]]:
            # By number: two configs of different kernels' classes may be equal.
            runs = {str(n): partial(_launched, kernel, config, case.launch) for n, config in enumerate(configs)}
            return list(self._timer(runs, self._device, rounds=rounds).values())

        first, *others = times([before, *candidates], _ROUNDS)
        order = sorted(range(len(candidates)), key=lambda n: statistics.median(others[n]))
        finalists = [candidates[n] for n in order[:_FINALISTS]]
        first, *others = times([before, *finalists], _FINAL_ROUNDS)
        now_takes = statistics.median(first)
        best, best_gain, best_takes = None, _GAIN, now_takes
        for config, taken in zip(finalists, others, strict=True):
            gain = ratio(first, taken)
            if gain["low"] > 1.0 and gain["median"] > best_gain:
                best, best_gain, best_takes = config, gain["median"], statistics.median(taken)
        return best, (now_takes, best_takes)

    def _keep(self, found: Searched) -> None:
        """Write what was found: None where nothing won, so that it is not searched again."""
        asked = found.asked
        identity = _identity(asked)
        kernel, device, dtype, shape = identity[1]
        assert found.seconds is not None
        self._entries[identity] = {
            "kernel": kernel,
            "device": device,
            "dtype": dtype,
            "shape": list(shape),
            "config": None if found.after is None else asdict(found.after),
            "measured": {
                "seconds": dict(zip(("before", "after"), found.seconds, strict=True)),
                "before": asdict(found.before),
                "shape": list(asked.shape),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "date": now(),
                "command": self._command,
            },
        }
        _write(self._path, list(self._entries.values()))
        _configs.forget()


class _OutOfTimeError(Exception):
    pass


class _Budget:
    """Counts steps, tells of each one before it is done, with the time left, and ends the search in time."""

    def __init__(self, seconds: float | None, total: int, progress: Progress | None) -> None:
        self._seconds, self._total, self._progress = seconds, total, progress
        self._done, self._start = 0, time.monotonic()

    def step(self, what: str) -> None:
        gone = time.monotonic() - self._start
        if self._seconds is not None and gone >= self._seconds:
            raise _OutOfTimeError
        if self._progress is not None:
            left = [gone / self._done * (self._total - self._done)] if self._done else []
            left += [] if self._seconds is None else [self._seconds - gone]
            told = f", {_duration(min(left))} left" if left else ""
            self._progress(what + told, self._done, self._total)
        self._done += 1

    def skip(self, steps: int) -> None:
        self._done += steps


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def _launched(kernel: str, config: Any, launch: Callable[[], object]) -> object:
    with _configs.forced(kernel, config):
        return launch()


class _Judge:
    """Says what is wrong with a config of a kernel, by the 2x rule on a case."""

    def __init__(self, kernel: str, case: Case) -> None:
        self._kernel, self._case = kernel, case
        self._dtype = next(iter(case.tensors.values())).dtype
        with torch.no_grad():
            self._dy = torch.randn_like(case.reference(**case.tensors))
        self._own = self._results(case.reference, self._dtype)
        self._truth = self._results(case.reference, torch.float64)

    def _results(self, function: Callable[..., torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The output and the gradient of every tensor, by name."""
        gradients = self._case.gradients
        leaves = {name: t.detach().to(dtype).requires_grad_(gradients) for name, t in self._case.tensors.items()}
        with exact_convolutions(self._dy.device):
            with torch.set_grad_enabled(gradients), dispatch.backend("triton"):
                y = function(**leaves)
            made = torch.autograd.grad(y, list(leaves.values()), self._dy.to(y.dtype)) if gradients else ()
        found = {"the result": y.detach()}
        if gradients:
            found |= {f"the gradient of {name}": t for name, t in zip(leaves, made, strict=True)}
        return {name: ends(t.detach()).cpu() for name, t in found.items()}

    def problem(self, config: Any) -> str | None:
        """Why a config is not to be used; None: its results are right. Raises TuningError if the GPU is lost."""
        try:
            with _configs.forced(self._kernel, config), _configs.watched() as asked:
                _launched(self._kernel, config, self._case.launch)
                if not any(each.kernel == self._kernel for each in asked):
                    return f"the case does not launch {self._kernel}"
                found = self._results(self._case.op, self._dtype)
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:  # whatever Triton's compiler or a launch raises
            with contextlib.suppress(Exception):
                _synchronize(self._dy.device)
                return f"{type(error).__name__}: {_first_line(error)}"
            raise TuningError(
                f"{self._kernel} with {config} broke the GPU's context: {_first_line(error)}; what was found before "
                "is in the table"
            ) from error
        for name, out in found.items():
            compared = compare(out, self._own[name], self._truth[name], rounding=torch.finfo(self._dtype).eps)
            if not compared.ok:
                return f"{name} is wrong"
        return None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _read(path: Path) -> dict[tuple[str, Key], Any]:
    """The entries of a table that goes on, as they stand there."""
    try:
        entries = _configs.read_entries(path)
        return {_configs.entry_key(entry): entry for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TuningError(f"can't read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise TuningError(
            f"{str(path)!r} is no table of launch configs: {error}; move it away, or correct it"
        ) from error


def check_writable(path: Path) -> None:
    """Raise TuningError where a table can't be written, before anything is searched. Makes its folder."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise TuningError(f"can't write {str(path)!r}: {error.strerror}") from error


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _write(path: Path, entries: Sequence[Any]) -> None:
    """Write a table. Whoever is killed meanwhile leaves the old file or the new one, never a part."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"schema": _configs.SCHEMA, "entries": entries}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise TuningError(f"can't write {str(path)!r}: {error.strerror}") from error
