"""Measurements of the labeling room, for `python -m bench label`."""
