"""A study in MLflow: a parent run a study, a child run a trial. The only package that imports mlflow, in functions."""
