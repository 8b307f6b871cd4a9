"""Calibration of probabilities, operating points, conformal prediction sets, and distances to the training images."""
