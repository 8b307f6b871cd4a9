"""What a network is and what it computes: architectures, inference, explanations, calibration, metrics.

In: pixels, or a bundle's weights. Out: probabilities, maps and scores as arrays. Nothing is trained, stored or
decided here, so that what serves a model need not import what trained it.
"""
