"""Launch configs: a rule in the code, and tables of what was measured on a card, which go before it.

Every `pick_config(kernel, shape, dtype, card)` is decorated with `tuned`. It looks for an entry for this kernel, card,
dtype and shape (with numbers of tokens rounded up to a power of two) in the user's table, then in this package's
(kernels/tables/*.json; nothing is tuned yet, so there is none), and else asks the rule. `fastconv tune` writes the
user's table, `user_table()`, by default ~/.config/fastconv/configs.json. Tables are read once, at the first launch.

A table is a file for somebody to edit, or to copy from another machine. So nothing in it is believed: an entry that is
malformed, impossible for its kernel, or measured with another minor version of triton, which compiles the same config
to other code, is left out, with one line in the log of the logger "fastconv".

    {"schema": 1, "entries": [{
        "kernel": "layer_norm_fwd", "device": "NVIDIA H200", "dtype": "bfloat16", "shape": [4096, 768],
        "config": {"block_t": 4, "block_c": 1024, "num_warps": 8, "registers": 80, "parts": 1},
        "measured": {"seconds": {"before": 1.2e-05, "after": 1.1e-05}, "torch": "2.11.0", "triton": "3.6.0",
                     "date": "2027-01-31T12:00:00+00:00", "command": "fastconv tune convbert-base", ...}}]}

A config of null: the search found nothing better than what is used without this table.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import math
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from . import _launch
from ._launch import Card

logger = logging.getLogger("fastconv")

SCHEMA = 1
_MEASURED = ("seconds", "torch", "triton", "date", "command")

# What a block can have on the GPUs that triton compiles for: 1024 threads, a register file of 255 a thread.
_MAX_WARPS, _MAX_STAGES, _MIN_REGISTERS, _MAX_REGISTERS = 32, 8, 16, 255
_MAX_BLOCK = 8192

Shape = tuple[int, ...]
Check = Callable[[str, Shape, torch.dtype, Card, Any], "str | None"]
Rule = TypeVar("Rule", bound=Callable[..., Any])


class Asked(NamedTuple):
    """What a launcher asked `pick_config` for."""

    kernel: str
    shape: Shape
    dtype: torch.dtype
    card: Card


_MOST_VALUES = 2**20  # of a tensor of Triton's


@dataclass(frozen=True)
class Kernel:
    """A kernel with launch configs.

    rule: its config for (kernel, shape, dtype, card), without any table
    config: the class of its configs
    rounded: how many sizes of its shape, the first ones, are numbers of tokens or rows
    vary: the fields that a search tries other values of
    check: what makes a config impossible for (kernel, shape, dtype, card, config), in words, or None
    """

    name: str
    rule: Callable[..., Any]
    config: type
    rounded: int
    vary: tuple[str, ...]
    check: Check

    def key_shape(self, shape: Shape) -> Shape:
        """The shape that entries for `shape` have."""
        return (*(triton.next_power_of_2(size) for size in shape[: self.rounded]), *shape[self.rounded :])

    def problem(self, config: Any, shape: Shape, dtype: torch.dtype, card: Card) -> str | None:
        """Why the kernel can't run so; None if it can, as far as that can be said without compiling it."""
        for field in fields(config):
            value = getattr(config, field.name)
            limits = _limits(field.name)
            if type(value) is not int or not limits[0] <= value <= limits[1]:
                return f"{field.name} must be an integer from {limits[0]} to {limits[1]}, got {value!r}"
            if field.name.startswith(("block_", "num_warps")) and value & (value - 1):
                return f"{field.name} must be a power of two, got {value}"
        blocks = sorted(getattr(config, field.name) for field in fields(config) if field.name.startswith("block_"))
        tile = math.prod(blocks[-2:])
        if tile > _MOST_VALUES:
            return f"the blocks of a tile may have {_MOST_VALUES} values, got {tile}"
        return self.check(self.name, shape, dtype, card, config)

    def candidates(self, shape: Shape, dtype: torch.dtype, card: Card) -> Iterator[Any]:
        """Configs around the rule's, without it: one field far from it, or two of them near. Each passes `problem`."""
        rule = self.rule(self.name, shape, dtype, card)
        values = {field: _near(field, getattr(rule, field)) for field in self.vary}
        changes = [{field: value} for field, (_, far) in values.items() for value in far]
        changes += [
            dict(zip(pair, chosen, strict=True))
            for pair in combinations(self.vary, 2)
            for chosen in product(*(values[field][0] for field in pair))
        ]
        found = {rule}
        for change in changes:
            config = replace(rule, **change)
            if config not in found and self.problem(config, shape, dtype, card) is None:
                found.add(config)
                yield config


def _limits(field: str) -> tuple[int, int]:
    if field == "num_warps":
        return 1, _MAX_WARPS // (2 if _launch.is_amd() else 1)
    return {"num_stages": (1, _MAX_STAGES), "registers": (_MIN_REGISTERS, _MAX_REGISTERS)}.get(field, (1, _MAX_BLOCK))


def _near(field: str, value: int) -> tuple[list[int], list[int]]:
    """Values to try in the place of one: together with another field's, and alone."""
    if field == "num_stages":
        # What AMD's compiler makes of it has no room in shared memory: the launchers say it there.
        if _launch.is_amd():
            return [], []
        return [value - 1, value + 1], [value - 2, value - 1, value + 1, value + 2]
    if field == "registers":
        return [], [64, 96, 128, 168, 255]
    near = [value * 2, *([value // 2] if value % 2 == 0 else [])]
    return near, [*near, value * 4, *([value // 4] if value % 4 == 0 else [])]


KERNELS: dict[str, Kernel] = {}
_caches: list[Callable[[], None]] = []
# For the whole process, not for a thread: on a GPU autograd runs a backward in a thread of its own.
_forced: dict[str, Any] = {}
_watching: list[list[Asked]] = []


def tuned(*kernels: str, vary: tuple[str, ...], config: type, check: Check, rounded: int = 1) -> Callable[[Rule], Rule]:
    """Decorator of a rule, (kernel, shape, dtype, card) -> config: what the tables say goes before it. See `Kernel`."""

    def decorate(rule: Rule) -> Rule:
        for name in kernels:
            KERNELS[name] = Kernel(name, rule, config, rounded, vary, check)

        # Packed batches come in any number of tokens: what is forgotten costs a few microseconds.
        @functools.lru_cache(maxsize=4096)
        def found(kernel: str, shape: Shape, dtype: torch.dtype, card: Card) -> Any:
            entry = _look_up(tables(), KERNELS[kernel], shape, dtype, card)
            return rule(kernel, shape, dtype, card) if entry is None else entry

        @functools.wraps(rule)
        def pick(kernel: str, shape: Shape, dtype: torch.dtype, card: Card) -> Any:
            if _forced or _watching:
                for asked in _watching:
                    asked.append(Asked(kernel, shape, dtype, card))
                if kernel in _forced:
                    return _forced[kernel]
            return found(kernel, shape, dtype, card)

        _caches.append(found.cache_clear)
        return pick  # type: ignore[return-value]

    return decorate


@contextlib.contextmanager
def forced(kernel: str, config: Any) -> Iterator[None]:
    """Context in which every launch of a kernel has this config, in the whole process, whatever tables and rule say."""
    before = _forced.get(kernel)
    _forced[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


@contextlib.contextmanager
def watched() -> Iterator[list[Asked]]:
    """Context whose list gets what is asked for, in the whole process, in the order of the launches."""
    asked: list[Asked] = []
    _watching.append(asked)
    try:
        yield asked
    finally:
        # Not remove(), which takes the first list that is equal.
        _watching[:] = [other for other in _watching if other is not asked]


def without_user_table(kernel: str, shape: Shape, dtype: torch.dtype, card: Card) -> Any:
    """The config that is picked where the user has no table."""
    entry = _look_up(tables()[1:], KERNELS[kernel], shape, dtype, card)
    return KERNELS[kernel].rule(kernel, shape, dtype, card) if entry is None else entry


# A key of tables: kernel, card, dtype, shape.
Key = tuple[str, str, str, Shape]


@dataclass(frozen=True)
class Table:
    """A file of entries. configs: of those that count; None: what is used without this table is best."""

    path: Path
    exists: bool
    configs: dict[Key, Any]
    ignored: tuple[str, ...]


_told: set[tuple[Path, Key]] = set()  # entries that a warning was about, of one shape of many


def key_of(kernel: Kernel, shape: Shape, dtype: torch.dtype, card: Card) -> Key:
    """What an entry for this launch has to say."""
    return kernel.name, card.name, str(dtype).removeprefix("torch."), kernel.key_shape(shape)


def _look_up(all_tables: tuple[Table, ...], kernel: Kernel, shape: Shape, dtype: torch.dtype, card: Card) -> Any:
    key = key_of(kernel, shape, dtype, card)
    for table in all_tables:
        config = table.configs.get(key)
        if config is None:
            continue
        # The entry's shape is rounded; this one is not.
        problem = kernel.problem(config, shape, dtype, card)
        if problem is None:
            return config
        if (table.path, key) not in _told:
            _told.add((table.path, key))
            message = "%s: the entry for %s %s is ignored for %s: %s"
            logger.warning(message, table.path, kernel.name, key[3], shape, problem)
    return None


def user_table() -> Path | None:
    """Where the user's table is, whether it exists or not; None where there is no home folder to look in."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    except RuntimeError:
        return None
    return folder / "fastconv" / "configs.json"


@functools.cache
def tables() -> tuple[Table, ...]:
    """The user's table and this package's, in the order in which they count."""
    path = user_table()
    users = Table(Path("configs.json"), False, {}, ()) if path is None else read_table(path)
    found = (users, *map(read_table, sorted((Path(__file__).parent / "tables").glob("*.json"))))
    for table in found:
        if table.ignored:
            told = "; ".join(table.ignored[:3]) + ("; ..." if len(table.ignored) > 3 else "")
            logger.warning("%s: launch configs are ignored: %s", table.path, told)
    return found


def forget() -> None:
    """Read the tables again at the next launch."""
    tables.cache_clear()
    for clear in _caches:
        clear()


def read_table(path: Path) -> Table:
    """A table's valid entries, and what is wrong with the others. Never raises."""
    try:
        entries = read_entries(path)
    except FileNotFoundError:
        return Table(path, False, {}, ())
    except (OSError, ValueError) as error:
        return Table(path, True, {}, (str(error),))
    configs: dict[Key, Any] = {}
    ignored: list[str] = []
    other: dict[str, int] = {}
    if entries:
        _import_kernels()
    for number, entry in enumerate(entries, 1):
        try:
            version, key, config = _parsed(entry)
        except ValueError as error:
            ignored.append(f"entry {number}: {error}")
            continue
        if minor(version) == minor(triton.__version__):
            configs[key] = config
        else:
            other[version] = other.get(version, 0) + 1
    ignored += [
        f"{count} measured with triton {version}, this is {triton.__version__}" for version, count in other.items()
    ]
    return Table(path, True, configs, tuple(ignored))


def read_entries(path: Path) -> list[Any]:
    """The entries of a table as they stand there. Raises: OSError, ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("entries"), list):
        raise ValueError(f'expected {{"schema": {SCHEMA}, "entries": [...]}}, as fastconv tune writes it')
    return content["entries"]


def entry_key(entry: Any) -> tuple[str, Key]:
    """The minor version of triton and the key of an entry. Raises ValueError."""
    version, key, _ = _parsed(entry)
    return minor(version), key


def _parsed(entry: Any) -> tuple[str, Key, Any]:
    """The version of triton, the key and the config of an entry. Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {type(entry).__name__}")
    name, device, dtype_name = entry.get("kernel"), entry.get("device"), entry.get("dtype")
    shape, values, measured = entry.get("shape"), entry.get("config"), entry.get("measured")
    if not isinstance(name, str) or name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}")
    if not isinstance(device, str):
        raise ValueError(f"device must be a GPU's name, got {device!r}")
    dtype = getattr(torch, dtype_name, None) if isinstance(dtype_name, str) else None
    if not isinstance(dtype_name, str) or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype_name!r}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape must be a list of sizes, got {shape!r}")
    if not isinstance(measured, dict) or set(_MEASURED) - set(measured) or not isinstance(measured["triton"], str):
        raise ValueError(f"measured must say {', '.join(_MEASURED)}; got {measured!r}")
    kernel = KERNELS[name]
    key = (name, device, dtype_name, tuple(shape))
    if values is None:
        return measured["triton"], key, None
    expected = [field.name for field in fields(kernel.config)]
    if not isinstance(values, dict) or sorted(values) != sorted(expected):
        raise ValueError(f"config of {name} must have {', '.join(expected)}, got {values!r}")
    config = kernel.config(**values)
    try:
        # The card may be another one: what it gives a block is looked at in the launch.
        problem = kernel.problem(config, tuple(shape), dtype, Card(device, 0, _MAX_SHARED))
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"shape of {name}: {shape!r} does not fit: {error}") from error
    if problem is not None:
        raise ValueError(f"{name} {shape}: {problem}")
    return measured["triton"], key, config


_MAX_SHARED = 2**20  # more than any


def minor(version: str) -> str:
    """The part of a version of triton that its compiler's choices depend on."""
    return ".".join(version.split(".")[:2])


def _import_kernels() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def all_kernels() -> dict[str, Kernel]:
    """Every kernel that has launch configs, by name."""
    _import_kernels()
    return KERNELS


def any_config(kernel: str, shape: Shape, dtype: torch.dtype, card: Card, config: Any) -> str | None:
    """The check of a kernel that can run with any tile."""
    return None


def matrix_problem(
    card: Card, dtype: torch.dtype, config: Any, tile: tuple[int, ...], sums: int, staged: int
) -> str | None:
    """Why matrix products can't be computed so, or None.

    tile: the sizes of the blocks that are multiplied
    sums: of the products, how many a program holds
    staged: how many values a stage of the loop over the inputs brings
    """
    if min(tile) < _LEAST:
        return f"blocks of products must be at least {_LEAST}, got {tile}"
    each = sums // (32 * config.num_warps)
    if each > _MAX_SUMS:
        return f"a thread can hold {_MAX_SUMS} sums of products, got {each}"
    # At least so much: what else is in shared memory only the compiler knows.
    needed = (config.num_stages - 1) * staged * dtype.itemsize
    if needed > card.shared:
        return f"{config.num_stages} stages need at least {needed} bytes of shared memory, a block gets {card.shared}"
    return None


# The smallest product that Triton makes, and the sums that leave a thread registers for anything else.
_LEAST, _MAX_SUMS = 16, 128
