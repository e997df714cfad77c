"""A study in MLflow: a parent run a study, a child run a trial. The only package that imports mlflow, in functions.

MLflow reads its settings when it is imported, so they are made here, before any of those functions runs.
"""

import logging
import os

# MLflow must not print, send telemetry, or block long in one call (we retry ourselves). A user's settings win.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_UV_AUTO_DETECT": "false",  # else a model gets the uv.lock of the folder that a command was typed in
}
# Overrides a user's setting: the printed URL of a run holds the server's password, and it breaks --json.
FORCED = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}

os.environ.update(QUIET | os.environ | FORCED)
# urllib3 warns of every refused connection; we log one line an outage.
logging.getLogger("urllib3.connectionpool").setLevel(logging.CRITICAL)
