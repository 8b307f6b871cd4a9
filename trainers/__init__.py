"""How a model is made: augmentation, optimization, the training loop and its distributed form, evaluation.

Images come decoded from `images`, networks and calibration from `vision`; only
`trainers.fitting.ray_group` imports Ray Train.
"""
