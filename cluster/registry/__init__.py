"""MLflow: runs, curves, registered models. Nothing else in Stillhouse knows MLflow's API."""

from cluster.registry.client import CHALLENGER, CHAMPION, shown
from cluster.registry.family import Registry, attach_report, code_version
from cluster.registry.models import (
    CHAMPIONS,
    PROMOTION,
    REASON,
    ChampionMovedError,
    Models,
    Standing,
    champion_of,
    fetch_model,
)

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "CHAMPIONS",
    "PROMOTION",
    "REASON",
    "ChampionMovedError",
    "Models",
    "Registry",
    "Standing",
    "attach_report",
    "champion_of",
    "code_version",
    "fetch_model",
    "shown",
]
