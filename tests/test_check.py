"""`check_cell`: every broken cell is caught by the check that is meant for it, and told why."""

import pytest

from lstmjax.check import CHECKS, check_cell
from tests.broken_cells import BROKEN

NAMES = [check.name for check in CHECKS]
QUICK = {"speed": False, "targets": ()}


def only(*names):
    """All checks but these and those that come before all others."""
    wanted = {"contract", "pure", "dtype", "init", "finite", *names}
    return [name for name in NAMES if name not in wanted]


@pytest.mark.parametrize("cell", BROKEN)
def test_a_broken_cell_is_caught_and_told_why(cell):
    check, words = BROKEN[cell]
    report = check_cell(cell, skip=only(check), **QUICK)
    assert report.failed == (check,), report
    assert words in str(report)
