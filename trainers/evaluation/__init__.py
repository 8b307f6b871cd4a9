"""Evaluation of a model on a split or a folder: metrics with intervals by group, robustness, heat maps, report."""
