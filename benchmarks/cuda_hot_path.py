"""The instructions that a warp issues for one tile of a k-means kernel, from the machine code.

The main loop of a kernel is its largest loop with tensor-core instructions, or with loads. Of all ways
through its body the one of an ordinary tile has the most of these and of matrix loads, what else it is known
to take (its 16-byte copies), and, of those, the fewest instructions: no flush, no ragged edge, no last tile.
An inner loop on that way is counted once; callers who do not expect one have it refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

COPY = "LDGSTS.E.BYPASS.128"  # cp.async of 16 bytes, past the L1 cache
PRODUCT = "HMMA"  # on a tensor core


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    predicate: str  # "" if it is always executed
    name: str  # with its modifiers
    target: str | None  # label that a branch goes to
    operands: str


@dataclass
class Function:
    """The instructions of a kernel, and where its labels are."""

    code: list[Instruction]
    labels: dict[str, int]  # label -> position in `code`


def parse(listing: str) -> dict[str, Function]:
    """The functions in the output of `nvdisasm -c`, by symbol."""
    functions: dict[str, Function] = {}
    for section in re.split(r"\n\s*\.section\s+\.text\.", listing)[1:]:
        symbol = re.match(r"\w+", section)
        assert symbol is not None
        function = functions[symbol[0]] = Function([], {})
        for line in section.splitlines():
            if label := re.match(r"(\.L\w+):", line):
                function.labels[label[1]] = len(function.code)
            line_of_code = re.match(r"\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)(.*)", line)
            if line_of_code:
                address, predicate, name, rest = line_of_code.groups()
                target = re.search(r"`\((\.L\w+)\)", rest)
                function.code.append(
                    Instruction(
                        int(address, 16),
                        predicate or "",
                        name,
                        target[1] if target else None,
                        rest,
                    )
                )
    return functions


def hot_path(
    function: Function, wanted: dict[str, int], *, of: str = PRODUCT, may_loop: bool = False
) -> list[Instruction]:
    """Instructions of an ordinary tile, in order.

    Args:
        wanted: names of instructions, and how many of each a tile takes.
        of: opcode that the main loop is known by.
        may_loop: whether an inner loop may lie on the way.

    Raises:
        ValueError: the kernel has no such loop, or another loop lies on the way.
    """
    blocks = _blocks(function)
    start, order = _main_loop(blocks, of)
    rank = {block: index for index, block in enumerate(order)}
    # Partial counts that decide -> the way with the fewest instructions so far.
    ways: dict[int, dict[tuple[int, ...], _Way]] = defaultdict(dict)
    ways[start][(0,) * (2 + len(wanted))] = _Way(0, None)
    ends: dict[tuple[int, ...], _Way] = {}
    for block in order:
        for found, way in ways.pop(block, {}).items():
            key = _add(found, _names(blocks[block].code), wanted, of)
            longer = _Way(way.length + len(blocks[block].code), (block, way))
            for following in blocks[block].following:
                if following == start:
                    ends[key] = _shorter(ends.get(key), longer)
                elif rank.get(following, -1) > rank[block]:
                    ways[following][key] = _shorter(ways[following].get(key), longer)
    chosen = list(ends[max(ends)].blocks())[::-1]
    for block in chosen:
        goes_back = [each for each in blocks[block].following if rank.get(each, len(rank)) <= rank[block]]
        if not may_loop and any(each != start and each in chosen for each in goes_back):
            raise ValueError(f"an inner loop lies on the hot path, at {function.code[block].address:#x}")
    return [instruction for block in chosen for instruction in blocks[block].code]


def count(path: list[Instruction], opcode: str) -> int:
    """How many instructions begin with `opcode`."""
    return _count(_names(path), opcode)


def loads_in_flight(path: list[Instruction]) -> int:
    """Bytes of device memory that a thread has asked for at most before it needs the first of them."""
    pending: list[set[int]] = []  # registers of each load
    most = 0
    for instruction in path:
        registers = {int(number) for number in re.findall(r"\bR(\d+)", instruction.operands)}
        pending = [load for load in pending if not load & registers]
        wide = re.match(r"LDG\.E.*?\.(64|128)", instruction.name)
        if wide:
            target = re.search(r"\bR(\d+)", instruction.operands)
            assert target is not None
            first = int(target[1])
            pending.append(set(range(first, first + int(wide[1]) // 32)))
            most = max(most, 4 * sum(map(len, pending)))
    return most


def shared_bytes(path: list[Instruction]) -> int:
    """Bytes of shared memory that the 32 threads of a warp ask for, each thread's counted."""
    total = 0
    for name, number in _names(path).items():
        opcode, *modifiers = name.split(".")
        if opcode in ("LDS", "STS"):
            wide = [int(each) // 8 for each in modifiers if each in ("64", "128")]
            narrow = [int(each[1:]) // 8 for each in modifiers if each in ("U8", "S8", "U16", "S16")]
            total += number * 32 * (wide + narrow + [4])[0]
        elif opcode == "LDSM":
            total += number * 128 * int(modifiers[-1])
        elif opcode == "LDGSTS":
            total += number * 32 * (16 if "128" in modifiers else 4)
    return total


@dataclass
class _Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    code: list[Instruction]
    following: list[int]


class _Way(NamedTuple):
    """A way through the loop: its length, and its last block with the way before it."""

    length: int
    end: tuple[int, _Way] | None

    def blocks(self) -> Iterator[int]:
        way = self
        while way.end is not None:
            yield way.end[0]
            way = way.end[1]


def _shorter(one: _Way | None, other: _Way) -> _Way:
    return other if one is None or other.length < one.length else one


def _add(found: tuple[int, ...], names: Counter[str], wanted: dict[str, int], of: str) -> tuple[int, ...]:
    first, matrices, *others = found
    capped = (min(n + names[each], wanted[each]) for n, each in zip(others, wanted, strict=True))
    return (first + _count(names, of), matrices + _count(names, "LDSM"), *capped)


def _names(path: list[Instruction]) -> Counter[str]:
    return Counter(instruction.name for instruction in path)


def _count(names: Counter[str], opcode: str) -> int:
    return sum(number for name, number in names.items() if name.startswith(opcode))


def _blocks(function: Function) -> dict[int, _Block]:
    """The blocks, by the position of their first instruction."""
    code = function.code
    after_branches = {position + 1 for position, each in enumerate(code) if _leaves(each)}
    firsts = sorted({0, *function.labels.values(), *after_branches} - {len(code)})
    blocks = {}
    for first, end in zip(firsts, [*firsts[1:], len(code)], strict=True):
        last, following = code[end - 1], [end] if end < len(code) else []
        if _leaves(last):
            is_conditional = last.predicate or "P" in last.operands.partition("`")[0]
            following = following if is_conditional else []
            if last.target is not None:
                following.append(function.labels[last.target])
        blocks[first] = _Block(code[first:end], following)
    return blocks


def _leaves(instruction: Instruction) -> bool:
    # BRA.DIV leaves only where a warp has diverged; CALL comes back, but from a label of the same kernel.
    name, *modifiers = instruction.name.split(".")
    if name == "CALL":
        return instruction.target is not None
    return name in ("BRA", "EXIT", "RET", "BRX") and "DIV" not in modifiers


def _main_loop(blocks: dict[int, _Block], of: str) -> tuple[int, list[int]]:
    """The first block of the largest loop with instructions `of`; and all of it, in order."""
    order, back_edges = _walk(blocks)
    before = defaultdict(list)
    for block, each in blocks.items():
        for following in each.following:
            before[following].append(block)
    largest: tuple[int, int, set[int]] = (0, 0, set())
    for latch, start in back_edges:
        body, stack = {start}, [latch]
        while stack:
            block = stack.pop()
            if block not in body:
                body.add(block)
                stack.extend(before[block])
        if any(count(blocks[block].code, of) for block in body):
            largest = max(largest, (len(body), start, body), key=lambda loop: loop[0])
    if not largest[2]:
        raise ValueError(f"the kernel has no loop with {of}")
    return largest[1], [block for block in order if block in largest[2]]


def _walk(blocks: dict[int, _Block]) -> tuple[list[int], list[tuple[int, int]]]:
    """All blocks that can be reached, each before those that follow it; and the edges that go back."""
    order: list[int] = []
    back_edges = []
    seen, on_way = {0}, {0}
    stack = [(0, iter(blocks[0].following))]
    while stack:
        block, following = stack[-1]
        for each in following:
            if each in on_way:
                back_edges.append((block, each))
            elif each not in seen:
                seen.add(each)
                on_way.add(each)
                stack.append((each, iter(blocks[each].following)))
                break
        else:
            order.append(block)
            on_way.remove(block)
            stack.pop()
    return order[::-1], back_edges
