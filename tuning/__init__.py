"""Which settings are best: the search space, the search, the report on it.

The space is derived from the registries of the trainers; only `tuning.ray_search` knows Ray Tune.
"""
