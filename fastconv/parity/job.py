"""verify: run one model by every path on the same text, and compare errors, speed and memory.

`prepare` checks what was asked for and reads what it needs; `Job.run` computes. Nothing here prints.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fastconv import reference
from fastconv.parity import batches, environment, measure, paths, subjects
from fastconv.parity.batches import Batch
from fastconv.parity.results import Row, Verification
from fastconv.parity.subjects import Subject
from fastconv.parity.text import default_sentences, sentences
from fastconv.reference.config import check_int
from fastconv.tolerance import Comparison, compare, exact_convolutions

# Called with what is done next, the steps done and the steps in all. The latter grows while more becomes known.
Progress = Callable[[str, int, int], None]
Inputs = dict[str, Tensor]

_BATCH = 8
# Of one pass of one path over the timed batches on a CPU, one to two seconds on two slow cores: MiniLM then takes under
# a minute there, and convbert-base under two.
_CPU_FLOPS = 80e9
_MOST_TIMED = 4
# Errors are compared on more batches than are timed. Trained weights have a few ill-conditioned outputs, and the
# largest error is that of one of them: on n batches of 8 sentences, MiniLM's paths that differ by rounding alone,
# transformers' own among them, broke the rule in 9 % (n = 1), 3 % (n = 8) and 0.4 % (n = 16) of the samples from 100
# batches (AMD EPYC, fp32, torch 2.13.0, transformers 5.23.0, 2026-11-20).
_MOST_COMPARED = 16
# Numbers in all outputs, which are held in fp64 a few times.
_MOST_NUMBERS = 3e7
# How long timing goes on, within these numbers of rounds.
_SECONDS = 20.0
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 50


def verify(
    model: str | os.PathLike[str],
    *,
    text: str | None = None,
    dtype: str | torch.dtype = "fp32",
    batch: int | None = None,
    length: int | None = None,
    padding: str = "keep",
    device: str | torch.device | None = None,
    rounds: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Run a model by every path (reference, transformers, transformers + accelerate, fastconv) on the same real text.

    model: a checkpoint folder, a hub id, or a name of fastconv.parity.shapes.NAMES, which gets random weights
    text: what the model reads, cut into sentences; None: the prose of CPython's help topics
    dtype: "fp32", "bf16" or "fp16", or the torch.dtype
    batch: sequences at a time; None: 8
    length: tokens of every sequence, made of joined sentences; None: a sequence is a sentence, and batches have padding
    padding: "remove" runs this library's paths without padding too, and compares the tokens of those with what that
        promises, and what each takes with the same path with its padding
    device: None: the first CUDA GPU if there is one, else the CPU
    rounds: times that every path runs over all batches; None: for about 20 s, at least 5
    progress: called after each step

    `result.ok` says whether every path of this library keeps the 2x rule (fastconv.tolerance) over all batches.

    Raises: ValueError, TypeError, OSError, ImportError for what can't be run, saying why, before anything is computed.
    """
    job = prepare(
        model, text=text, dtype=dtype, batch=batch, length=length, padding=padding, device=device, rounds=rounds
    )
    return job.run(progress)


def prepare(
    model: str | os.PathLike[str],
    *,
    text: str | None = None,
    dtype: str | torch.dtype = "fp32",
    batch: int | None = None,
    length: int | None = None,
    padding: str = "keep",
    device: str | torch.device | None = None,
    rounds: int | None = None,
) -> Job:
    """Check the arguments of `verify`, load the model and tokenize the text. Raises what `verify` does."""
    batch = _BATCH if batch is None else batch
    check_int("batch", batch, 1)
    if length is not None:
        check_int("length", length, 3)
    if rounds is not None:
        check_int("rounds", rounds, 1)
    if padding not in ("keep", "remove"):
        raise ValueError(f'padding must be "keep" or "remove", got {padding!r}')
    place = environment.usable_device(device)
    kind = environment.usable_dtype(dtype, place)
    read = default_sentences() if text is None else sentences(text)
    if not read:
        raise ValueError("the text is empty; expected at least one sentence")
    subject = subjects.load(model, read)
    if padding == "remove" and subject.config.is_decoder:
        raise ValueError(f'padding must be "keep" for {subject.name}, which is a decoder, got "remove"')
    made, timed = _batches(subject, read, batch, length, place)
    return Job(subject, made, timed, kind, place, rounds, padding)


@dataclass(frozen=True)
class Job:
    """A verification that is ready to run; errors are compared on all batches, the first `timed` are timed."""

    subject: Subject
    batches: Sequence[Batch]
    timed: int
    dtype: torch.dtype
    device: torch.device
    rounds: int | None
    padding: str = "keep"

    def run(self, progress: Progress | None = None) -> Verification:
        """Compute, see `verify`."""
        subject = self.subject
        steps = _Steps(progress, 2)
        inputs = [self._inputs(batch) for batch in self.batches]
        steps("reference in fp64")
        truths = self._truths(inputs)
        steps("building the models")
        built, missing = paths.build(
            subject.class_name, subject.config, subject.weights, self.dtype, self.device, self.padding
        )
        rounds = self.rounds or _FEWEST_ROUNDS
        steps.total += len(built) * (3 + rounds)

        comparisons = self._compare(built, inputs, truths, steps)
        del truths
        with torch.inference_mode():
            timed = inputs[: self.timed]
            largest = max(timed, key=lambda each: each["input_ids"].numel())
            peaks = []
            for path in built:
                steps(f"memory: {path.name}")
                peaks.append(measure.peak_bytes(partial(_run_all, path.model, [largest]), self.device))
            runs = {path.name: partial(_run_all, path.model, timed) for path in built}
            warm = measure.interleaved(runs, self.device, rounds=1, tell=lambda name: steps(f"warming up: {name}"))
            if self.rounds is None:
                each_round = sum(seconds for (seconds,) in warm.values())
                rounds = max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, int(_SECONDS / each_round)))
                steps.total += len(built) * (rounds - _FEWEST_ROUNDS)
            times = measure.interleaved(
                runs, self.device, rounds=rounds, tell=lambda name: steps(f"timing, {rounds} rounds: {name}")
            )
        steps("done")
        rows = [
            Row(path.name, path.ours, compared, times[path.name], peak, path.replaced)
            for path, compared, peak in zip(built, comparisons, peaks, strict=True)
        ]
        return self._result(rows, [*subject.notes, *([missing] if missing else [])])

    def _inputs(self, batch: Batch) -> Inputs:
        choices = self.subject.class_name.endswith("ForMultipleChoice")
        return {name: (tensor[:, None] if choices else tensor).to(self.device) for name, tensor in batch.inputs.items()}

    def _alone(self, path: paths.Path) -> bool:
        """Whether a path promises what the reference gives each sequence alone, not what it gives the batch."""
        return path.removes and self._convolves()

    def _convolves(self) -> bool:
        return isinstance(self.subject.config, reference.ConvBertConfig)

    def _truths(self, inputs: Sequence[Inputs]) -> dict[bool, Tensor]:
        """Of the batches and, if a path promises that, of the sequences alone."""
        # Of the devices, CPUs and CUDA GPUs have fp64.
        place = self.device if self.device.type == "cuda" else torch.device("cpu")
        subject = self.subject
        model = paths.truth(subject.class_name, subject.config, subject.weights, self.dtype).to(place)
        moved = [{name: tensor.to(place) for name, tensor in each.items()} for each in inputs]
        alone = self.padding == "remove" and self._convolves()
        return {kind: self._outputs(model, moved, kind) for kind in ((False, True) if alone else (False,))}

    def _compare(
        self, built: Sequence[paths.Path], inputs: Sequence[Inputs], truths: dict[bool, Tensor], steps: _Steps
    ) -> list[Comparison]:
        found: list[Comparison] = []
        own: dict[bool, Tensor] = {}
        with exact_convolutions(self.device):
            for path in built:
                steps(f"comparing with fp64: {path.name}")
                if not own:  # the first path is the reference
                    own = {alone: self._outputs(path.model, inputs, alone) for alone in truths}
                outputs = own[False] if path is built[0] else self._outputs(path.model, inputs)
                alone = self._alone(path)
                found.append(compare(outputs, own[alone], truths[alone]))
        return found

    def _outputs(self, model: nn.Module, inputs: Sequence[Inputs], alone: bool = False) -> Tensor:
        """The main outputs of all batches as one row of numbers, on the CPU."""
        outputs = paths.outputs_alone if alone else partial(paths.main_outputs, tokens_only=self.padding == "remove")
        with torch.inference_mode():
            return torch.cat([tensor.flatten().cpu() for each in inputs for tensor in outputs(model, each)])

    def _result(self, rows: Sequence[Row], notes: Sequence[str]) -> Verification:
        subject = self.subject
        return Verification(
            model=subject.name,
            class_name=subject.class_name,
            source=subject.source,
            parameters=subject.parameters,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            device_name=environment.device_name(self.device),
            ops=environment.implementation(self.device),
            threads=torch.get_num_threads(),
            shapes=[tuple(batch.inputs["input_ids"].shape) for batch in self.batches],
            lengths=[batch.lengths for batch in self.batches],
            timed=self.timed,
            rows=rows,
            notes=notes,
            versions=environment.versions(),
            padding_removed=self.padding == "remove",
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


class _Steps:
    """Counts steps and tells of each one before it is done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.total = total
        self._done = 0
        self._progress = progress

    def __call__(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._done, self.total)
        self._done += 1


def _batches(
    subject: Subject, read: Sequence[str], batch: int, length: int | None, device: torch.device
) -> tuple[list[Batch], int]:
    """The batches to compare on, as many as the device affords, and how many of them to time."""
    limit = subject.max_length
    if length is not None and length > limit:
        raise ValueError(f"length must be at most {limit}, which is all that {subject.name} takes, got {length}")

    def make(count: int) -> list[Batch]:
        if length is None:
            return batches.from_sentences(read, subject.tokenizer, batch=batch, count=count, max_length=limit)
        return batches.of_length(read, subject.tokenizer, batch=batch, count=count, length=length)

    size = make(1)[0].size
    affordable = _CPU_FLOPS / (subject.flops_per_token() * size) if device.type == "cpu" else _MOST_TIMED
    compared = min(2 * affordable, _MOST_NUMBERS / (size * subject.numbers_per_token()), _MOST_COMPARED)
    made = make(max(1, int(compared)))
    highest = max(int(each.inputs["input_ids"].max()) for each in made)
    if highest >= subject.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {subject.name} gives the id {highest}, but its config has vocab_size "
            f"{subject.config.vocab_size}; do they belong together?"
        )
    return made, max(1, int(min(affordable, len(made), _MOST_TIMED)))


def _run_all(model: nn.Module, inputs: Sequence[Inputs]) -> None:
    for each in inputs:
        model(**each)
