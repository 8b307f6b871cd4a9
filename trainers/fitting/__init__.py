"""How a network learns: its data, the loop and its steps, checkpoints, workers, and the way from dataset to bundle."""
