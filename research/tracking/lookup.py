"""What is asked of a store through MLflow's client: a run, the experiments, a run's folder."""

from pathlib import Path
from typing import Any

from research.tracking.store import TrackingError


def run_of_id(client: Any, run_id: str) -> Any:
    """The run as MLflow keeps it, None if there is none; TrackingError for a deleted one."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    if run.info.lifecycle_stage != "active":
        raise TrackingError(
            f"Run {run.info.run_name} ({run_id}) was deleted. Bring it back with: mlflow runs "
            f"restore --run-id {run_id}"
        )
    return run


def all_experiments(client: Any) -> list[str]:
    """The ids of the experiments that were not deleted."""
    found, page = [], None
    while page != "":
        part = client.search_experiments(max_results=1000, page_token=page)
        found += [experiment.experiment_id for experiment in part]
        page = part.token or ""
    return found


def local_folder(artifact_uri: str) -> Path | None:
    """The folder behind MLflow's address of files; None where no file system keeps them."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    return Path(local_file_uri_to_path(artifact_uri)) if is_local_uri(artifact_uri) else None
