"""Does my cell do what I think it does? As ``python -m lstmjax.check``."""

from lstmjax.check.__main__ import main


def run() -> None:
    """Parse the command line, check, print."""
    main("lstmjax check")
