"""What a run chooses for its learning: optimizers, schedules, losses and samplers, each a registry of records."""
