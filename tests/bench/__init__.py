"""Benchmarks: `uv run python -m tests.bench NAME`. Each prints a table; nothing of them runs in the test suites."""
