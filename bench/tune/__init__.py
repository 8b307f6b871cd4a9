"""Measurements of a search: the cost of Ray Tune, and searches replayed on a table (`python -m bench tune`)."""
