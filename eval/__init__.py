"""Checkpoints to sample logs, figures and a report."""

import data_prep  # noqa: F401 - says so where this Python lacks the libraries
