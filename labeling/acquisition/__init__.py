"""Acquisition: the images on which an annotator's minute is best spent. `registry` holds the rules."""
