"""Figures over labels and predictions: balanced accuracy, rates, calibration error, and their intervals by group."""
