"""How fast and how large a training is, beside the same network without it and beside what others would write."""
