"""What probabilities may promise: temperature and bias, operating points, conformal sets."""
