"""Per-step classification: has the running sum of ten random numbers reached ten quarters yet?

``lstmjax cumsum`` from a checkout: lstmjax/commands/cumsum.py has the program, and what
to expect.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("cumsum")
