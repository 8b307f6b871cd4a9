"""Ledger, datasets, search and labeling at sizes beyond one machine's daily use."""
