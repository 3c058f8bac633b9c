"""The ahead-of-time gate itself: it passes good kernels, and it can fail, in every way that it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the gate compiles Triton kernels")

TESTS = Path(__file__).parent


def run_gate(package: str, targets: str, figures: Path) -> tuple[int, str, dict]:
    """The gate in a process of its own (here kernels may be interpreted): its exit code, output and figures."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        TESTS / "aot.py",
        "--package",
        package,
        "--targets",
        targets,
        "--json",
        figures,
        "--jobs=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert figures.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(figures.read_text())


def launch(figures: dict, name: str, target: str) -> dict:
    """The one launch of this name and target."""
    (found,) = (r for r in figures["launches"] if r["launch"] == name and r["target"] == target)
    return found


def test_aot_good_kernels_pass(tmp_path):
    code, output, figures = run_gate("aot_samples.good", "sm_90,gfx942", tmp_path / "figures.json")
    assert code == 0, output
    assert output.splitlines()[-1].endswith("PASS")
    # Equal launches are compiled once; an unaligned pointer makes another one.
    assert sorted({r["launch"] for r in figures["launches"]}) == [
        "an unaligned pointer, a tile of 2 bytes a thread",
        "copy",
        "gather",
        "matmul",
    ]
    # 1024 values of 2 bytes over 128 threads are one 16-byte load a thread; gfx942 has 256 threads and needs 8 bytes.
    assert launch(figures, "copy", "sm_90")["loads"] == {"16": 1}
    assert launch(figures, "copy", "gfx942")["stores"] == {"8": 1}
    assert launch(figures, "gather", "sm_90")["loads"] == {"2": 8}
    assert list(launch(figures, "matmul", "sm_90")["matrix"]) == ["wgmma"]
    assert list(launch(figures, "matmul", "gfx942")["matrix"]) == ["mfma"]
    assert all(0 < r["registers"] <= 255 and r["stack"] == 0 for r in figures["launches"])


def test_aot_bad_kernels_fail(tmp_path):
    code, output, figures = run_gate("aot_samples.bad", "sm_90", tmp_path / "figures.json")
    assert code == 1
    assert output.splitlines()[-1].endswith("FAIL")
    assert launch(figures, "spill", "sm_90")["stack"] > 0
    expected = (
        "_forgotten_kernel is not launched by launches(dtype, device)",
        "unlaunched has kernels (_lone_kernel) but no launches(dtype, device)",
        "_spill_kernel sm_90 [bfloat16 spill, 1 warps] spills",
        "load of x_ptr at tiles.py:19 (1024 values of 2 bytes, 128 threads) moves in 2-byte instructions, not 16",
        "[bfloat16 shared, 8 warps] needs 262144 bytes of shared memory, a block gets 232448",
        "_broken_kernel sm_90 [bfloat16 broken, 4 warps] does not compile",
    )
    for problem in expected:
        assert sum(problem in p for p in figures["problems"]) == 1, f"{problem!r} not in {figures['problems']}"
        assert problem in output
    assert len(figures["problems"]) == len(expected)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--targets=sm_1", "unknown target sm_1: expected some of sm_80,sm_90,sm_100,gfx942"),
        ("--dtypes=fp8", "unknown dtype fp8: expected some of bfloat16,float32,float16"),
    ],
)
def test_aot_refuses_what_it_does_not_know(option, said):
    done = subprocess.run([sys.executable, TESTS / "aot.py", option], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr


def test_aot_inspect_ptx_instructions():
    from aot_inspect import instructions

    ptx = """
        .loc 1 10 4
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        // begin inline asm
        .loc 1 12 4
        mov.u32 %r1, %r5;
        .loc 1 13 4
        ld.global.L1::evict_last.b16 { %rs1 }, [ %rd1 + 0 ];
        // end inline asm
        st.global.v8.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 };
        cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
        ld.shared.b32 %r1, [%r2];
        .file 1 "/a/kernel.py"
    """
    assert instructions(ptx, amd=False) == {
        ("kernel.py", 10, 4): {("load", 16): 1},
        ("kernel.py", 12, 4): {("load", 2): 1, ("store", 32): 1, ("load", 16): 1},
    }


def test_aot_inspect_amd_instructions():
    from aot_inspect import Resources, amd_resources, instructions

    assembly = """
        .file 1 "/a" "kernel.py"
        .loc 1 10 4 is_stmt 0
        buffer_load_dwordx4 v[6:9], v2, s[40:43], 0 offen
        global_load_ushort v1, v0, s[0:1]
        scratch_store_dword off, v1, s0
        .loc 1 11 2
        global_store_dwordx2 v0, v[2:3], s[4:5]
    """
    assert instructions(assembly, amd=True) == {
        ("kernel.py", 10, 4): {("load", 16): 1, ("load", 2): 1},
        ("kernel.py", 11, 2): {("store", 8): 1},
    }
    metadata = "    .private_segment_fixed_size: {}\n    .vgpr_count:     37\n    .vgpr_spill_count: {}\n"
    assert amd_resources(metadata.format(0, 0)) == Resources(37, 0)
    assert amd_resources(metadata.format(12, 3)) == Resources(37, 12)
    assert amd_resources(metadata.format(0, 3)) == Resources(37, 12)


def test_aot_inspect_follows_pointers_through_loops():
    from aot_inspect import Access, accesses

    ttir = """
#loc = loc("/a/kernel.py":1:0)
#loc1 = loc("/a/kernel.py":7:9)
#loc2 = loc("x"(#loc1))
#loc3 = loc(callsite(#loc2 at #loc))
  tt.func public @k(%x_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), %y_ptr: !tt.ptr<f32> loc("y_ptr"(#loc))) {
    %0 = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<8x64x!tt.ptr<bf16>> loc(#loc1)
    %1:2 = scf.for %i = %c0 to %c4 step %c1 iter_args(%acc = %cst, %p = %0) -> (tensor<8x64xf32>, tensor<8x64x!tt.ptr<bf16>>)  : i32 {
      %2 = tt.load %p, %m evictionPolicy = evict_last : tensor<8x64x!tt.ptr<bf16>> loc(#loc3)
      %3 = tt.addptr %p, %o : tensor<8x64x!tt.ptr<bf16>>, tensor<8x64xi32> loc(#loc1)
    }
    %4 = tt.load %1#1 : tensor<8x64x!tt.ptr<bf16>> loc(#loc1)
    %5 = tt.splat %y_ptr : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc1)
    tt.store %5, %6 : tensor<64x!tt.ptr<f32>> loc(#loc1)
"""  # noqa: E501 (as Triton prints it)
    at = ("kernel.py", 7, 9)
    assert accesses(ttir) == [
        Access("load", "x_ptr", True, (8, 64), 2, at),
        Access("load", "x_ptr", True, (8, 64), 2, at),
        Access("store", "y_ptr", False, (64,), 4, at),
    ]


@pytest.mark.parametrize(
    ("shape", "element_bytes", "aligned", "threads", "wide"),
    [
        ((4, 256), 2, True, 128, True),
        ((4, 256), 2, True, 129, False),  # less than 16 bytes a thread
        ((4, 256), 2, False, 128, False),
        ((1024, 4), 2, True, 128, False),  # rows of 8 bytes
        ((1024,), 4, True, 256, True),
    ],
)
def test_aot_inspect_must_be_wide(shape, element_bytes, aligned, threads, wide):
    from aot_inspect import Access

    assert Access("load", "x_ptr", aligned, shape, element_bytes, ("kernel.py", 1, 1)).must_be_wide(threads) is wide
