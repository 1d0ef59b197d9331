"""What a Hopper kernel was assembled from, and into: faults that no compiler speaks of.

`hazards` looks at PTX, the program as the assembler is given it, and at SASS, what the device runs.
"""

import re
from collections.abc import Iterator

_BASE = 1024
"""Alignment of a block's shared memory, on which Mosaic GPU relies, too."""


def hazards(ptx: str, sass: str, report: str) -> list[str]:
    """What would stop a kernel on a device, make it wrong, or slow: a clause each.

    Args:
        ptx: of one kernel.
        sass: of the same.
        report: what the assembler said of it.
    """
    found = [*dict.fromkeys([*_misaligned(ptx), *_rewritten(ptx), *_unordered(ptx)])]
    if number := counts(sass, "MEMBAR.ALL.GPU")["MEMBAR.ALL.GPU"]:
        found.append(f"{number} fences of the whole GPU in the loop over time")
    if re.search(r"wgmma\.mma_async instructions are serialized", report):
        found.append("its products wait for one another (the assembler says: serialized)")
    return found


def counts(sass: str, *operations: str) -> dict[str, int]:
    """How often each operation stands in the loop over time."""
    loop = "\n".join(time_loop(sass))
    return {name: len(re.findall(rf"\b{re.escape(name)}\b", loop)) for name in operations}


# --- Loops ---------------------------------------------------------------------------------------

_LABEL = re.compile(r"^\s*(\$L\w+|\.L\w+):")
_BRANCH = re.compile(r"\b(?:bra|BRA)\b.*?(\$L\w+|\.L\w+)")
_GOES = re.compile(r"^\s*(?:/\*\w+\*/\s*)?(?:bra|BRA|ret|EXIT)(?:\.uni)?\s*(?:`\(|\$L|;|$)")
"""Branches that are always taken."""


def time_loop(text: str) -> list[str]:
    """The lines of the largest loop of a kernel, PTX or SASS: those that reach one another.

    Waiting is moved out of line, so that first and last line do not tell.
    """
    blocks, after = _blocks(text)
    reached = [_reachable(after, k) for k in range(len(blocks))]
    loops = [sorted(j for j in reached[k] if k in reached[j]) for k in range(len(blocks))]
    sizes = [sum(len(blocks[j]) for j in loop) for loop in loops]
    return [line for j in loops[sizes.index(max(sizes))] for line in blocks[j]]


def _blocks(text: str) -> tuple[list[list[str]], list[list[int]]]:
    """What is run from its first line to its last, and which of them may come next."""
    blocks: list[list[str]] = [[]]
    names: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            blocks.append([])
            names[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if _BRANCH.search(line) or _GOES.match(line):
            blocks.append([])
    after = [_successors(block, k, names) for k, block in enumerate(blocks)]
    return blocks, [[j for j in ahead if j < len(blocks)] for ahead in after]


def _successors(block: list[str], k: int, names: dict[str, int]) -> list[int]:
    last = block[-1] if block else ""
    branch = _BRANCH.search(last)
    taken = [names[branch[1]]] if branch and branch[1] in names else []
    return taken if _GOES.match(last) else [*taken, k + 1]


def _reachable(after: list[list[int]], start: int) -> set[int]:
    found: set[int] = set()
    ahead = list(after[start])
    while ahead:
        k = ahead.pop()
        if k not in found:
            found.add(k)
            ahead += after[k]
    return found


# --- Where copies go -----------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);")
_ADDRESS = re.compile(r"\[\s*(%r\w+)\s*(?:\+\s*(-?\d+))?\s*\]")
_ANY = 64
"""Zero bits of zero, which is a multiple of whatever one likes."""


def _misaligned(ptx: str) -> Iterator[str]:
    """Bulk copies whose place in shared memory is not a multiple of what the copy engine wants."""
    blocks, after = _blocks(ptx)
    for block, known in zip(blocks, _known(blocks, after), strict=True):
        for name, operands in _instructions(block):
            if name.startswith("cp.async.bulk") and (places := _ADDRESS.findall(operands)):
                inwards = re.search(r"\.shared::\w+\.global", name)
                register, offset = places[0 if inwards else -1]
                aligned = 1 << min(known.get(register, _ANY), _zeros(int(offset or 0)))
                wanted = 128 if "tensor" in name else 16
                if aligned < wanted:
                    kind = "a tensor" if wanted == 128 else "an array"
                    yield f"{kind} is copied at a multiple of {aligned} bytes, not of {wanted}"
            _follow(name, operands, known)


def _instructions(block: list[str]) -> list[tuple[str, str]]:
    found = map(_INSTRUCTION.match, block)
    return [(each[1], each[2]) for each in found if each]


def _known(blocks: list[list[str]], after: list[list[int]]) -> list[dict[str, int]]:
    """Zero bits at the end of each register on the way into each block, whichever way it took.

    A register that is not there may hold anything, as nothing has been written to it yet.
    """
    entering: list[dict[str, int]] = [{} for _ in blocks]
    programs = [_instructions(block) for block in blocks]
    ahead = list(range(len(blocks)))
    while ahead:
        k = ahead.pop(0)
        known = dict(entering[k])
        for name, operands in programs[k]:
            _follow(name, operands, known)
        for j in after[k]:
            merged = {r: min(z, entering[j].get(r, _ANY)) for r, z in known.items()}
            if entering[j] | merged != entering[j]:
                entering[j] |= merged
                ahead.append(j)
    return entering


def _follow(name: str, operands: str, known: dict[str, int]) -> None:
    """What an instruction changes of ``known``."""
    target, *sources = re.split(r"\s*,\s*", operands)
    if target.startswith("%r") and sources:
        zeros = [_operand_zeros(source, known) for source in sources]
        known[target] = min(_result_zeros(name, zeros, sources), _ANY)


def _operand_zeros(operand: str, known: dict[str, int]) -> int:
    if re.fullmatch(r"-?\d+", operand):
        return _zeros(int(operand))
    if operand.startswith("%"):  # of the machine: its threads' and blocks' numbers
        return known.get(operand, _ANY) if operand.startswith("%r") else 0
    return _zeros(_BASE)


def _zeros(number: int) -> int:
    return (number & -number).bit_length() - 1 if number else _ANY


def _result_zeros(name: str, zeros: list[int], sources: list[str]) -> int:
    """Trailing zeros of a result, from those of what it is made of; 0 where nothing is known."""
    match name.split(".")[0]:
        case "mov" | "cvt" | "cvta":
            return zeros[0]
        case "add" | "sub" | "or" | "xor" | "selp":
            return min(zeros[:2])
        case "and":
            return max(zeros)
        case "mul" if ".hi" not in name:
            return zeros[0] + zeros[1]
        case "mad":
            return min(zeros[0] + zeros[1], zeros[2])
        case "shl" if sources[1].isdigit():
            return zeros[0] + int(sources[1])
        case _:
            return 0


# --- Products under way --------------------------------------------------------------------------


def _rewritten(ptx: str) -> Iterator[str]:
    """Registers that a product under way reads and the next turn of a loop without a wait writes.

    PTX leaves undefined what the product then sees, even where the same value is written.
    """
    for loop in _inner_loops(ptx):
        if "wgmma.wait_group" in loop:
            continue
        written = set(re.findall(r"^\s*(?:mov|or|and|add)\S*\s+(%r\d+)\s*,", loop, re.MULTILINE))
        products = re.findall(r"wgmma\.mma_async\S*\s*\{[^}]*\}\s*,\s*\{([^}]*)\}", loop)
        read = {register for product in products for register in re.findall(r"%r\d+", product)}
        if read & written:
            yield f"{len(read & written)} registers of products under way are written again"


def _inner_loops(ptx: str) -> Iterator[str]:
    """The text of each loop of PTX that ends where it began."""
    lines = ptx.splitlines()
    at = {label[1]: k for k, line in enumerate(lines) if (label := _LABEL.match(line))}
    for k, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and at.get(branch[1], k) < k:
            yield "\n".join(lines[at[branch[1]] : k])


# --- What is not waited for ----------------------------------------------------------------------


def _unordered(ptx: str) -> Iterator[str]:
    """What the loop over time has to say to the copy engine and the tensor cores, and does not."""
    loop = "\n".join(time_loop(ptx))
    if ".bulk_group" in loop and "cp.async.bulk.wait_group" not in loop:
        yield "memory that is copied from is written again without a wait"
    if "wgmma.mma_async" in loop and "fence.proxy.async" not in loop:
        yield "products read memory that no fence has shown them"
