"""`relook demo`: the whole loop, once, on real processes, told as a story.

`story` says what happens in which order, `traffic` sends the images, `drills` holds the two
planted tests, `view` shows it, `summary` writes down what came of it. Nothing in here is
needed by the product; everything it does, it does through the rooms' own functions.
"""
