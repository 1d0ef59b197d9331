"""``python -m lstmjax`` is the command ``lstmjax``."""

from lstmjax.commands import main

if __name__ == "__main__":
    main()
