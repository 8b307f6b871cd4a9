"""Networks and what they compute: architectures, inference, explanations, calibration, metrics.

In: pixels, or a bundle's weights. Out: probabilities, maps and scores as arrays. Nothing is trained, stored or
decided here, so serving imports this package without importing training.
"""
