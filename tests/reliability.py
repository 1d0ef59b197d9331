"""Writes the table of docs/reliability.md from what the tests have told: ``make long``."""

import json
import pathlib
import sys

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- the table: written by the tests -->\n", "<!-- its end -->\n"


def table(lines):
    """The lines in Markdown; told by several tests, they are one after the other."""
    rows = [
        "| fault | how it is injected | times | lost | what the user is told |",
        "|---|---|---|---|---|",
    ]
    for fault, how, times, told in map(json.loads, lines):
        cells = (fault, how, f"{times:,}", "nothing", told)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def main(told):
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    lines = dict.fromkeys(pathlib.Path(told).read_text().splitlines())
    PAGE.write_text(before + BEGIN + table(lines) + END + after)


if __name__ == "__main__":
    main(sys.argv[1])
