"""What a check found, for a person and for a machine."""

import dataclasses
from typing import Any, Literal

Status = Literal["ok", "failed", "not run"]


class Failure(Exception):
    """A check that a cell does not pass.

    Attributes:
        told: what is wrong, with numbers.
        cause: what it most likely comes from.
        remedy: what to do about it.
    """

    def __init__(self, told: str, cause: str = "", remedy: str = "") -> None:
        super().__init__(told)
        self.told, self.cause, self.remedy = told, cause, remedy


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one check.

    Attributes:
        name: of the check.
        status: ``"ok"``, ``"failed"`` or ``"not run"``.
        told: what was found, or why it was not run.
        cause: of a failure, as far as it can be guessed.
        remedy: what to do about it.
        seconds: that it took.
    """

    name: str
    status: Status
    told: str
    cause: str = ""
    remedy: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """All that `lstmjax.check_cell` found; ``str()`` is what a person reads.

    Attributes:
        cell: the cell, as it prints.
        where: its file and line.
        results: one a check.
        facts: what neither passes nor fails: engines, speed, compilers.
        seconds: that all took.
    """

    cell: str
    where: str
    results: tuple[Result, ...]
    facts: dict[str, str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(result.name for result in self.results if result.status == "failed")

    def __getitem__(self, name: str) -> Result:
        """The result of a check, by name."""
        return next(result for result in self.results if result.name == name)

    def to_json(self) -> dict[str, Any]:
        """As plain numbers and strings."""
        return dataclasses.asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        """Failures with cause and remedy where they happened, then the facts, then the verdict."""
        wide = max(len(name) for name in (*(r.name for r in self.results), *self.facts, "remedy"))
        lines = [f"{self.cell}{self.where}"]
        for r in self.results:
            mark = {"ok": "  ok    ", "failed": "  FAILED", "not run": "  -     "}[r.status]
            lines.append(f"{mark}  {r.name:<{wide}}  {r.told}")
            more = (("cause", r.cause), ("remedy", r.remedy))
            lines += [f"{'':8}  {what:>{wide}}: {text}" for what, text in more if text]
        lines += [f"{'':8}  {name:<{wide}}  {text}" for name, text in self.facts.items()]
        count = len(self.failed)
        if count:
            verdict = f"{count} check{'s' * (count > 1)} failed: {', '.join(self.failed)}"
        else:
            verdict = f"all {sum(r.status == 'ok' for r in self.results)} checks passed"
        return "\n".join([*lines, f"{verdict} ({self.seconds:.0f} s)"])
