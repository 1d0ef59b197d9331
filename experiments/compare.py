"""Compare cells on tasks, with the same seeds and the same budget, and say what was shown.

``lstmjax compare`` from a checkout: lstmjax/commands/compare.py has the program.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("compare")
