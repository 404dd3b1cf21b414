"""What the kernels of `sigmoid_nmi` compile to: registers, spills and shared memory of all shipped tiles.

Needs no GPU. Spills are bytes of stack of a thread. fp16 compiles like bf16; the sweep is that for up to 128
prompts and 1,024 tokens.
"""

from __future__ import annotations

from spt_fast.ops.nmi_triton import compile_all


def main() -> None:
    print("python -m benchmarks.nmi_compiled")
    for arch in (80, 90, 100):
        for name, found in compile_all(arch):
            print(
                f"sm_{arch:<4d}{name:23s}{found.registers:4d} registers{found.spills:5d} B spilled"
                f"{found.shared:8d} B shared",
                flush=True,
            )


if __name__ == "__main__":
    main()
