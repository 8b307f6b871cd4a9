"""Inference with a trained network: the loaded model, folding of batch norm, golden inputs."""
