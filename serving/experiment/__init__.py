"""An A/B test of arms that one can believe: what it measures, what its intervals are worth, when it decides.

Pure logic: nothing here knows Ray, a clock, a disk or a network. Whoever runs an experiment hands it what the ingress
saw (:class:`Observation`) and what the teacher said (:class:`Quality`), asks it for a :class:`Decision` as often as
wanted, and acts on it.
"""

from serving.experiment.decision import Decision
from serving.experiment.experiment import Experiment
from serving.experiment.observation import Observation, Quality
from serving.experiment.spec import ExperimentSpec, Guards, RampStep

__all__ = ["Decision", "Experiment", "ExperimentSpec", "Guards", "Observation", "Quality", "RampStep"]
