"""Checkpoints to sample logs, figures and a report."""
