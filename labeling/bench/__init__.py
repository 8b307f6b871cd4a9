"""Measurements of the labeling room, for `relook bench label`."""
