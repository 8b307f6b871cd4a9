"""Measurements of a search, behind `python -m bench tune`."""
