"""Ledger, datasets, search and labeling at sizes far beyond daily use."""
