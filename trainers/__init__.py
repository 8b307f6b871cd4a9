"""How a model is made, and how a finished one computes.

Making: data, augmentation, models, optimizers, schedulers, the loop, the distributed run, calibration,
evaluation. Computing: inference and explanations as functions without state. Only `records` is
imported from outside the room; only `trainers.fitting.distributed` knows Ray Train.
"""
