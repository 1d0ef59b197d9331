"""Look inside a trained model: why does it say what it says of a text?

``lstmjax inspect`` from a checkout: lstmjax/commands/inspect.py has the program.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("inspect")
