"""The load generator: closed or open loop against any OpenAI-compatible endpoint, with figures per arm.

:mod:`~serving.bench.settings` is what may be asked for, :mod:`~serving.bench.arrivals` says when requests are due,
:mod:`~serving.bench.workload` what they hold, :mod:`~serving.bench.client` sends one and times its stream,
:mod:`~serving.bench.run` drives them, :mod:`~serving.bench.result` says what came of it and
:mod:`~serving.bench.table` shows it.
"""

from serving.bench.client import ARM_HEADER
from serving.bench.result import ArmResult, BenchResult
from serving.bench.run import measure, run_bench
from serving.bench.sample import Sample
from serving.bench.settings import Settings

__all__ = ["ARM_HEADER", "ArmResult", "BenchResult", "Sample", "Settings", "measure", "run_bench"]
