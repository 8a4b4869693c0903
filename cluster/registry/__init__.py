"""MLflow: runs, curves, registered models. Nothing else in Stillhouse knows MLflow's API."""

from cluster.registry.calls import Calls
from cluster.registry.client import (
    CHALLENGER,
    CHAMPION,
    PATIENCE_S,
    AwayError,
    RefusedError,
    check_experiment,
    default_tracking_uri,
    few_retries,
    shown,
    tracking_uri_of_environment,
)
from cluster.registry.family import Registry, attach_report, code_version, log_figures
from cluster.registry.files import fetch_model, on_this_node
from cluster.registry.models import (
    CHAMPIONS,
    PROMOTION,
    REASON,
    ChampionMovedError,
    Models,
    Standing,
    champion_of,
)

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "CHAMPIONS",
    "PATIENCE_S",
    "PROMOTION",
    "REASON",
    "AwayError",
    "Calls",
    "ChampionMovedError",
    "Models",
    "RefusedError",
    "Registry",
    "Standing",
    "attach_report",
    "champion_of",
    "check_experiment",
    "code_version",
    "default_tracking_uri",
    "fetch_model",
    "few_retries",
    "log_figures",
    "on_this_node",
    "shown",
    "tracking_uri_of_environment",
]
