"""Static bundles of a program for a TPU, counted in what libtpu writes of it.

A bundle is what a core issues in one cycle. Loops whose number of passes is known count that many
times. What a core waits for (memory, results of the matrix unit) is not in these figures.
"""

import dataclasses
import json
import pathlib
import re

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+([A-Z: ]*?)\s*:?\s*(>*)\s*\{")
_ADDED = re.compile(r"(%s\w+) = sadd\.s32 (?:\([^)]*\), )?(\d+), ")
_EXIT = re.compile(
    r"(%p\w+) = scmp\.(?:ge|eq)\.s32\.totalorder (?:\([^)]*\), )?(%s\w+), (\d+) "
    r"/\* loop exit test"
)
_DELAY = 4  # bundles behind a branch that are still run
_FILE = re.compile(r"^\d+-(.*)-\d+-final_bundles\.txt$")


@dataclasses.dataclass
class Loop:
    """A loop of a program, or (``depth`` 0, one pass) the program itself.

    Attributes:
        depth: how many loops it is in, itself included.
        passes: how often it is run; None where the program does not say.
        own: bundles of a pass outside of inner loops.
        inner: its inner loops.
    """

    depth: int
    passes: int | None = None
    own: int = 0
    inner: list["Loop"] = dataclasses.field(default_factory=list)
    _exit: str | None = None
    _left: int | None = None  # bundles until its end, once the branch back is found
    _steps: dict[str, int] = dataclasses.field(default_factory=dict)

    def a_pass(self) -> int:
        """Bundles of one pass; an inner loop that does not say counts once."""
        return self.own + sum((loop.passes or 1) * loop.a_pass() for loop in self.inner)


def read_loops(text: str) -> Loop:
    """The loops of a program from the text of its final bundles."""
    stack = [Loop(0, passes=1)]
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            while stack[-1]._left == 0:
                stack.pop()
            if "LB" in bundle[1]:
                _begin(stack, depth=len(bundle[2]))
            stack[-1].own += 1
            if stack[-1]._left is not None:
                stack[-1]._left -= 1
        _note_exit(stack[-1], line)
    return stack[0]


def _begin(stack: list[Loop], depth: int) -> None:
    while stack[-1].depth >= depth > 0:
        stack.pop()
    stack[-1].inner.append(Loop(depth))
    stack.append(stack[-1].inner[-1])


def _note_exit(loop: Loop, line: str) -> None:
    """Find how far a counter goes each pass, where it ends, and the branch that looks at it."""
    loop._steps.update({register: int(step) for register, step in _ADDED.findall(line)})
    if test := _EXIT.search(line):
        loop._exit = test[1]
        loop.passes = -(-int(test[3]) // loop._steps.get(test[2], 1))
    if loop._exit and f"sbr.rel (!{loop._exit})" in line:
        loop._left = _DELAY


def read_dump(folder: pathlib.Path) -> dict[str, Loop]:
    """All programs in a folder that libtpu dumped to, by the name of their instruction."""
    found = {}
    for path in folder.glob("*-final_bundles.txt"):
        name = _FILE.match(path.name)
        if name and "schedule-analysis" not in path.name:
            found[name[1]] = read_loops(path.read_text(errors="replace"))
    return found


def read_vmem(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """Bytes of VMEM that each program takes, by their use, from libtpu's report."""
    found = {}
    for path in folder.glob("*-vmem_report.html"):
        text = path.read_text(errors="replace").partition("const DATA =")[2].lstrip()
        report, _ = json.JSONDecoder().raw_decode(text)
        for name, breakdown in report["hlo_breakdowns"].items():
            blocks = breakdown["blocks"]
            found[name] = {block["block_type"]: block["block_size"] for block in blocks}
    return found


def loops_over(hlo: str, steps: int) -> list[list[str]]:
    """Names of the instructions in each ``while`` of a compiled module that has stacked arrays.

    Args:
        hlo: text of the module.
        steps: leading axis of what a loop reads or writes step by step.
    """
    computations: dict[str, list[str]] = {}
    bodies, current = [], ""
    for line in hlo.splitlines():
        if begin := re.match(r"^(?:ENTRY )?%?([\w.<>-]+) \(.*\{$", line):
            current = begin[1]
            computations[current] = []
        elif instruction := re.match(r"^\s+(?:ROOT )?%([\w.-]+) = ", line):
            computations[current].append(instruction[1])
            body = re.search(r" while\(.*body=%?([\w.-]+)", line)
            if body and f"[{steps}," in line:
                bodies.append(body[1])
    return [computations[body] for body in bodies]
