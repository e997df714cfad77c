"""Searches whose processes are killed at random moments: `python -m tests.chaos`."""
