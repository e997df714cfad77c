"""Spaces, studies and their storage. Knows optuna; never imports torch itself."""
