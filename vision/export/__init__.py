"""Models for other programs: one graph from pixels to what the service stores about a prediction."""
