"""One command for a machine with a GPU: what training and prediction reach on it, without Ray."""
