"""Which parts of the LSTM matter? The ablations of "LSTM: A Search Space Odyssey".

``lstmjax odyssey`` from a checkout: lstmjax/commands/odyssey.py has the program.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("odyssey")
