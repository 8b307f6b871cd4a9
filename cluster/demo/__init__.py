"""`relook demo`: the whole loop once, on real processes.

`run` calls the stages in order, `stages` says what each does, `traffic` sends images, `faults` injects two
errors, `view` shows progress and `state` keeps results in the home. The product does not need this package.
"""
