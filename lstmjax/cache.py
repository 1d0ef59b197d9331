"""Where everything is kept that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``LSTMJAX_CACHE_DIR``, else ``$XDG_CACHE_HOME/lstmjax``, else ``~/.cache/lstmjax``."""
    folder = os.environ.get("LSTMJAX_CACHE_DIR")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lstmjax")
    return Path(folder).expanduser()
