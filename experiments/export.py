"""A trained model as programs for CPU, GPU and TPU, which run without this library.

``lstmjax export`` from a checkout: lstmjax/commands/export.py has the program.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("export")
