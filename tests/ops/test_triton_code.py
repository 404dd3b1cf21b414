"""What is read from compiled kernels, on code written for it."""

from __future__ import annotations

import pytest

from spt_fast.ops import triton_code
from spt_fast.ops.triton_code import copies_in_flight, spills_in_loop, unordered_writes


def assembly(*lines: str) -> str:
    """Instructions and labels as nvdisasm prints them."""
    return "\n".join(
        f"{line}:" if line.startswith(".") else f"        /*{16 * number:04x}*/  {line} ;"
        for number, line in enumerate(lines)
    )


def test_copies_in_flight_are_those_that_a_wait_leaves() -> None:
    assert copies_in_flight("") == 0
    assert copies_in_flight("cp.async.wait_group 0;\ncp.async.wait_group \t4;\ncp.async.wait_group 0;") == 4


def test_a_write_is_unordered_without_a_barrier_behind_the_last_read() -> None:
    read, write, barrier = "@%p1 ld.global.v4.b32 {%r1};", "@%p1 st.global.b32 [%rd1];", "bar.sync 0;"
    assert unordered_writes("\n".join([write, read, write, barrier, write, write])) == [
        False,
        True,
        False,
        False,
    ]


def test_spills_count_in_the_shortest_loop_that_multiplies() -> None:
    outer = ["STL [R1], R2", ".L_x_1", "LDL R2, [R1]"]
    copying = [".L_x_3", "LDL R3, [R1]", "@P1 BRA `(.L_x_3)"]
    multiplying = [".L_x_2", "HMMA.16816.F32 R4, R8, R12, R4", "@P0 BRA `(.L_x_2)"]
    end = ["@P0 BRA `(.L_x_1)"]
    assert spills_in_loop(assembly(*outer, *copying, *multiplying, *end)) == 0
    multiplying[1:1] = ["LDL.64 R4, [R1+0x8]", "STL [R1], R4"]
    assert spills_in_loop(assembly(*outer, *copying, *multiplying, *end)) == 2
    assert spills_in_loop(assembly(*outer, *copying, *end)) == 0


@pytest.mark.parametrize(("stack", "in_loop"), [(0, 0), (8, 1)])
def test_code_is_disassembled_only_where_something_is_on_the_stack(
    stack: int, in_loop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    asked = []

    def output(command: list[str]) -> str:
        asked.append(command[1])
        loop = assembly(".L_x_1", "LDL R2, [R1]", "FFMA R2, R2, R2, R2", "@P0 BRA `(.L_x_1)")
        return loop if command[1] == "-c" else f" Function f:\n  REG:40 STACK:{stack} SHARED:0"

    monkeypatch.setattr(triton_code, "_output", output)
    assert triton_code._resources(b"") == (40, stack, in_loop)
    assert asked == ["-res-usage", "-c"][: 1 + in_loop]
