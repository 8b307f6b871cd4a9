"""Measurements and long drills; not installed with the product, and nothing of the product imports it."""
