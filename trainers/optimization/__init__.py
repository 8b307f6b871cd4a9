"""Optimizers, schedules, losses and samplers, each a registry of records from which the settings choose."""
