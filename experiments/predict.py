"""What a trained model says of texts.

``lstmjax predict`` from a checkout: lstmjax/commands/predict.py has the program.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("predict")
