"""Measurements of labeling: throughput (`python -m bench label`), acquisition rules, label noise."""
