"""How a finished network computes: the loaded model, batch norm folded away, golden inputs."""
