"""How many CPU cores there are for this process."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator


def usable_cores() -> int:
    """CPU cores this process may use: those it is bound to, or its container's quota if less."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min(bound or 1, cpu_quota())))


def cpu_quota(root: pathlib.Path = pathlib.Path("/")) -> float:
    """Cores' worth of time that Linux control groups leave this process; inf without a limit.

    A quota counts for all that is below it, so those of the enclosing groups are looked at as well.

    Args:
        root: the file system's root.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    quotas = [math.inf]
    for group in groups:  # "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1
        controllers, _, path = group.partition(":")[2].partition(":")
        if controllers == "" or "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            innermost = mount / path.lstrip("/")
            for folder in (innermost, *innermost.parents):
                quotas += _quotas(folder)
                if folder == mount:
                    break
    return min(quotas)


def _quotas(folder: pathlib.Path) -> Iterator[float]:
    """The quota that one control group sets, in cores."""
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        yield quota / period
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
        )
        if quota > 0:  # -1: no limit
            yield quota / period
