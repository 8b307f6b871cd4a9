"""What full collections of a process that serves requests look at.

The libraries of a replica make 400,000 objects that live as long as it does. A full collection looks at each of them,
which stops every thread for 200 ms, and the more objects requests leave behind, the more often it happens.
"""

import gc


def freeze_what_stays() -> None:
    """Leave all objects of now out of later collections; call it once, before anything that is replaced is loaded."""
    # Objects in a cycle would never be freed if they were frozen, so garbage has to go first, and models come later.
    gc.collect()
    gc.freeze()
