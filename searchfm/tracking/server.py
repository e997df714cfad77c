"""MLflow's server as an ASGI app, for `searchfm dashboard`: no job runners, no telemetry, no assistant."""

import os
import warnings
from typing import Any

from searchfm.home import TRACKING, Home
from searchfm.tracking.mirror import make_schema

# Read when mlflow is imported. The guard before the app checks Host and Origin.
_SETTINGS = {
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def create_app(home: Home, *, serve_artifacts: bool) -> Any:
    """The server of the database that MLFLOW_TRACKING_URI names, else of the home's. Once a process, whose variables
    it sets. Raises StorageError.

    serve_artifacts: clients on other hosts send their artifacts through the server, which keeps them in the home; else
    clients on this machine write there themselves.
    """
    os.environ.update(_SETTINGS)
    make_schema(home)  # in a file only one process at a time may
    uri, folder = home.tracking_uri, home.artifacts.as_uri()
    root = "mlflow-artifacts:/" if serve_artifacts else folder
    os.environ.pop(TRACKING, None)

    from mlflow.server import constants  # `mlflow server` sets these for its workers

    os.environ[constants.BACKEND_STORE_URI_ENV_VAR] = uri
    os.environ[constants.REGISTRY_STORE_URI_ENV_VAR] = uri
    os.environ[constants.ARTIFACT_ROOT_ENV_VAR] = root
    if serve_artifacts:
        os.environ[constants.SERVE_ARTIFACTS_ENV_VAR] = "true"
        os.environ[constants.ARTIFACTS_DESTINATION_ENV_VAR] = folder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Starlette warns, on the user's terminal, of a module that MLflow uses
        from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(uri, uri, root)

    async def without_client(scope: Any, receive: Any, send: Any) -> None:
        """MLflow's assistant runs commands for clients at a loopback address, which another user of this machine has
        too: the app sees no address.
        """
        await app({**scope, "client": None}, receive, send)

    return without_client
