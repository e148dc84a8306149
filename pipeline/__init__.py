"""Stages and the training core."""

import os

import data_prep  # noqa: F401 - says so where this Python lacks the libraries

# Read by OpenMP when torch loads it. Threads that spin while they wait slow each other down up
# to twenty times where another process wants the core; threads that sleep lose nothing
# measurable on a quiet machine (both measured with the embedded engine on 2 cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
