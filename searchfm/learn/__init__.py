"""Data, models and training. Knows torch; never optuna, mlflow, ray or typer."""
