"""Hyperparameter search for image classifiers: search, prune, track, retrain, test once."""

__version__ = "0.3.0"
