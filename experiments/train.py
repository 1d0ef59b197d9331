"""Train a cell on a task: adding, copying, state tracking, recall, digits, characters, texts.

``lstmjax train`` from a checkout: lstmjax/commands/train.py has the program.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("train")
