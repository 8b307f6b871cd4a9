"""The only place that knows Ray Tune: trials on a running Ray session, cut off by successive halving."""

from tuning.ray_search.run import TrialFunction, run_trials

__all__ = ["TrialFunction", "run_trials"]
