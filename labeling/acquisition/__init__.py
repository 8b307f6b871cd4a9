"""Acquisition rules: which images to label next."""
