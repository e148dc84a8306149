"""Stages and the training core."""
