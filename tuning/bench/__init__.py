"""Measurements of a search, behind `relook bench tune`."""
