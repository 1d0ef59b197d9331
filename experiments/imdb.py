"""Sentiment of movie reviews: is a review positive or negative?

``lstmjax imdb`` from a checkout: lstmjax/commands/imdb.py has the program, the recipes,
and what to expect.
"""

if __name__ == "__main__":
    from lstmjax.commands import run

    run("imdb")
