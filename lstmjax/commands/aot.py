"""Will my cell run on that device, and how? As ``python -m lstmjax.aot``."""

from lstmjax.aot.__main__ import main


def run() -> None:
    """Parse the command line, compile, print."""
    main()
