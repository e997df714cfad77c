"""Spaces, studies and their storage. Knows optuna; never imports torch itself."""

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its lines would stand between those that a command prints
