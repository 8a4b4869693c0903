"""The family spec: the one place where a setting is declared, documented and validated.

A spec is data. It is read once (:mod:`cluster.specfile`), frozen, and never changed while a family runs. This
package imports pydantic and nothing heavier, so a laptop without torch can check a spec before it submits it.
What needs a model or a corpus to be looked at is checked in :mod:`cluster.preflight`.
"""

from cluster.spec.base import NAME_PATTERN, Section
from cluster.spec.family import (
    CheckpointSpec,
    CorpusSpec,
    EvaluationSpec,
    FamilySpec,
    ReplicaRange,
    ServingSpec,
    StreamSpec,
    TeacherSpec,
    TrackingSpec,
)
from cluster.spec.labels import DenseLabels, HiddenLabels, LabelsSpec, SampledLabels, TopKLabels
from cluster.spec.limits import LimitsSpec
from cluster.spec.loss import Divergence, LossSpec, Ramp
from cluster.spec.notify import Event, NotifySpec
from cluster.spec.promotion import PromotionSpec
from cluster.spec.store import StoreSpec
from cluster.spec.students import OptimizerSpec, Pretrained, ScheduleSpec, Scratch, StudentSpec, TeacherLayers

__all__ = [
    "NAME_PATTERN",
    "CheckpointSpec",
    "CorpusSpec",
    "DenseLabels",
    "Divergence",
    "EvaluationSpec",
    "Event",
    "FamilySpec",
    "HiddenLabels",
    "LabelsSpec",
    "LimitsSpec",
    "LossSpec",
    "NotifySpec",
    "OptimizerSpec",
    "Pretrained",
    "PromotionSpec",
    "Ramp",
    "ReplicaRange",
    "SampledLabels",
    "ScheduleSpec",
    "Scratch",
    "Section",
    "ServingSpec",
    "StoreSpec",
    "StreamSpec",
    "StudentSpec",
    "TeacherLayers",
    "TeacherSpec",
    "TopKLabels",
    "TrackingSpec",
]
