"""Labeling with Label Studio: review items become tasks, annotations become labels, and consensus joins them.

This room reads review items and blobs from the store and writes annotations into it. It decodes images to
embed them in tasks; it never runs a model and trains nothing.
"""
