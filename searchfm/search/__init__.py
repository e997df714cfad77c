"""Spaces, studies and their storage. Knows optuna; never imports torch itself."""

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)  # its log lines would mix with the output of a command
