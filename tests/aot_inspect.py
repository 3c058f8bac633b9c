"""What a compiled kernel does, read off its intermediate code and assembly: memory accesses, registers, spills.

Every access is known by the source location (file, line, column) that both the Triton IR and the assembly carry.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

Location = tuple[str, int, int]  # file name, line, column

_ELEMENT_BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "i1": 1}  # fp8, int8: 1


@dataclass(frozen=True)
class Access:
    """One tl.load or tl.store of a tile."""

    kind: str  # "load" or "store"
    pointer: str  # the kernel argument that the address comes from, "" if it can't be followed
    aligned: bool  # whether the JIT knows that argument to be a multiple of 16
    shape: tuple[int, ...]
    element_bytes: int
    location: Location

    def must_be_wide(self, threads: int) -> bool:
        """Whether it has to move in 16-byte instructions: a tile with 16 bytes for every thread, in rows of 16 bytes.

        Smaller tiles (a mean per token, the weights of few channels) have nothing to gain.
        """
        row = self.shape[-1] * self.element_bytes
        tile = row
        for size in self.shape[:-1]:
            tile *= size
        return self.aligned and row >= 16 and tile >= 16 * threads


@dataclass(frozen=True)
class Dot:
    """One tl.dot: (m, k) times (k, n) of `dtype`."""

    m: int
    n: int
    k: int
    dtype: str
    tf32: bool


def accesses(ttir: str) -> list[Access]:
    """The tile accesses of a kernel's Triton IR; scalars are left out."""
    locations = _locations(ttir)
    arguments = dict(re.findall(r"%(\w+): !tt\.ptr<\w+>(?: \{([^}]*)\})?", ttir))
    # In the order of the text: a name is good for its region only, and the next region may use it again.
    roots: dict[str, str] = {}
    found = []
    for line in ttir.splitlines():
        for name, parent in _pointer_moves(line):
            roots[name] = roots.get(parent, parent)
        access = re.search(
            r"tt\.(load|store) %([\w#]+).* : tensor<((?:\d+x)+)!tt\.ptr<(\w+)(?:, \d+)?>> loc\((#loc\d*)\)", line
        )
        if access:
            kind, operand, dims, element, loc = access.groups()
            pointer = roots.get(operand, operand)
            pointer = pointer if pointer in arguments else ""
            aligned = not pointer or "divisibility = 16" in arguments[pointer]
            shape = tuple(int(d) for d in dims.split("x")[:-1])
            size = _ELEMENT_BYTES.get(element, 1)
            found.append(Access(kind, pointer, aligned, shape, size, locations.get(loc, ("", 0, 0))))
    return found


def dots(ttir: str) -> list[Dot]:
    """The matrix products of a kernel's Triton IR."""
    pattern = r"tt\.dot (.*) : tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>"
    return [Dot(int(m), int(n), int(k), dtype, "tf32" in attrs) for attrs, m, k, dtype, n in re.findall(pattern, ttir)]


def _locations(ttir: str) -> dict[str, Location]:
    """MLIR's location names -> the innermost source location behind each."""
    text = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def resolve(body: str) -> Location | None:
        direct = re.match(r'"([^"]*)":(\d+):(\d+)', body)
        if direct:
            return Path(direct[1]).name, int(direct[2]), int(direct[3])
        # callsite(callee at caller), fused[...], "name"(#loc): the first that leads to a file.
        inner = (resolve(text[name]) for name in re.findall(r"#loc\d*", body) if name in text)
        return next((found for found in inner if found), None)

    return {name: found for name, body in text.items() if (found := resolve(body))}


def _pointer_moves(line: str) -> list[tuple[str, str]]:
    """SSA values that a line defines, each with that which its pointer comes from: pointer arithmetic and loops."""
    moves = r"tt\.addptr|tt\.splat|tt\.broadcast|tt\.expand_dims|tt\.bitcast|tt\.reshape|tt\.trans"
    found = re.findall(rf"%([\w#]+) = (?:{moves}) %([\w#]+)", line)
    found += re.findall(r"%(\w+) = arith\.select %\w+, %([\w#]+)", line)
    loop = re.search(r"(?:%(\w+)(?::\d+)? = )?scf\.\w+ .*iter_args\(([^)]*)\)", line)
    if loop:
        for i, (inner, start) in enumerate(re.findall(r"%(\w+) = %([\w#]+)", loop[2])):
            found += [(inner, start), (f"{loop[1]}#{i}", start)]
            found += [(loop[1], start)] if i == 0 else []
    return found


_FILE = r'\.file[ \t]+(\d+)[ \t]+(?:"[^"]*"[ \t]+)?"([^"]+)"'


def instructions(assembly: str, amd: bool) -> dict[Location, Counter[tuple[str, int]]]:
    """Global memory instructions of PTX or AMD assembly: location -> how many of each ("load" or "store", bytes)."""
    files = {number: Path(path).name for number, path in re.findall(_FILE, assembly)}
    found: dict[Location, Counter[tuple[str, int]]] = defaultdict(Counter)
    here: Location = ("", 0, 0)
    inside = located = False  # of inline assembly
    for line in assembly.splitlines():
        if "inline asm" in line:
            inside, located = "begin" in line, False
        elif at := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)", line):
            # In inline assembly Triton 3.9 counts on from the source's line: only the first is a place in the source.
            if not located:
                here = files.get(at[1], ""), int(at[2]), int(at[3])
            located = inside
        elif moved := (_amd_access(line) if amd else _ptx_access(line)):
            found[here][moved] += 1
    return dict(found)


def _ptx_access(line: str) -> tuple[str, int] | None:
    if copy := re.search(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)", line):
        return "load", int(copy[1], 0)
    access = re.search(r"\b(ld|st)\.(?:\w+\.)*global\b([\w.:]*)", line)
    if not access:
        return None
    vector, bits = re.search(r"\.v(\d)", access[2]), re.search(r"\.[bufs](\d+)", access[2])
    size = (int(vector[1]) if vector else 1) * (int(bits[1]) // 8 if bits else 1)
    return ("load" if access[1] == "ld" else "store"), size


def _amd_access(line: str) -> tuple[str, int] | None:
    access = re.match(r"\s*(?:global|buffer|flat)_(load|store)_(?:lds_)?(dword|[us]?short|[us]?byte)(?:x(\d))?", line)
    if not access:
        return None
    unit = 4 if access[2] == "dword" else 2 if "short" in access[2] else 1
    return access[1], unit * int(access[3] or 1)


def matrix_instructions(assembly: str) -> dict[str, int]:
    """Matrix instructions of PTX or AMD assembly, by kind."""
    kinds = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"\bmma\.sync", "mfma": r"v_mfma_"}
    counts = {kind: len(re.findall(pattern, assembly)) for kind, pattern in kinds.items()}
    return {kind: count for kind, count in counts.items() if count}


@dataclass(frozen=True)
class Resources:
    """Registers of a thread and bytes of its stack (spills, arrays that don't fit in registers)."""

    registers: int
    stack: int


def amd_resources(assembly: str) -> Resources:
    """From the metadata at the end of AMD assembly; spilled registers that leave no stack count 4 bytes each.

    Not so scalar registers: without a stack they are kept in the lanes of a vector register.
    """
    value = {name: int(n) for name, n in re.findall(r"^\s+-?\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    spilled = 4 * value.get("vgpr_spill_count", 0)
    return Resources(value["vgpr_count"], max(value["private_segment_fixed_size"], spilled))


def _cuobjdump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def cubin_resources(cubin: Path) -> Resources:
    """By cuobjdump from Triton's own wheel."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("--dump-resource-usage", cubin))
    assert found, f"cuobjdump printed no resource usage for {cubin}"
    return Resources(int(found[1]), int(found[2]))


def sass_instructions(cubin: Path) -> Counter[tuple[str, int]]:
    """Memory instructions of the machine code: ("load" or "store", bytes), and ("local", 0) for spills."""
    found: Counter[tuple[str, int]] = Counter()
    for name, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|LDL|STL)\b((?:\.\w+)*)", _cuobjdump("--dump-sass", cubin)):
        if name in ("LDL", "STL"):
            found["local", 0] += 1
            continue
        width = re.search(r"\.(?:ENL2\.)?(64|128|256)\b|\.[US](8|16)\b", modifiers)
        bits = int(width[1] or width[2]) if width else 32
        found["store" if name == "STG" else "load", bits // 8] += 1
    return found
