"""What a check found, for a person and for a machine."""

import dataclasses
import html
from typing import Literal

from lstmjax.shown import html_table

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

    def to_json(self) -> dict[str, object]:
        """As plain numbers and strings."""
        return dataclasses.asdict(self) | {"ok": self.ok}

    @property
    def verdict(self) -> str:
        """What came of it, in a line."""
        if self.failed:
            count = len(self.failed)
            found = f"{count} check{'s' * (count > 1)} failed: {', '.join(self.failed)}"
        else:
            found = f"all {sum(r.status == 'ok' for r in self.results)} checks passed"
        return f"{found} ({self.seconds:.0f} s)"

    def __repr__(self) -> str:
        return f"Report({self.cell}: {self.verdict})"

    def _repr_html_(self) -> str:
        """The table of a notebook."""
        rows = [["", "check", "found", "cause", "remedy"]]
        rows += [[r.status, r.name, r.told, r.cause, r.remedy] for r in self.results]
        rows += [["", name, text, "", ""] for name, text in self.facts.items()]
        used = [n for n in range(5) if n < 3 or any(row[n] for row in rows[1:])]
        table = html_table([[row[n] for n in used] for row in rows])
        title, verdict = html.escape(f"{self.cell}{self.where}"), html.escape(self.verdict)
        return f"<p>{title}</p>{table}<p>{verdict}</p>"

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
        return "\n".join([*lines, self.verdict])
