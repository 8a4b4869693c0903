"""What runs an arm's model: one small interface (:mod:`serving.engines.base`) and the engines that offer it.

Importing this package loads no engine: only the process that holds a model loads torch or vLLM. Another engine is one
file with a class and one line in :data:`ENGINES`.
"""

from importlib import import_module
from pathlib import Path

from cluster.errors import UserError
from serving.engines.base import Engine

ENGINES = {
    "transformers": "serving.engines.transformers:TransformersEngine",
    "vllm": "serving.engines.vllm:VllmEngine",
    "echo": "serving.engines.echo:EchoEngine",
}
"""Engine by name, as ``module:class``. A class is called with the arguments of :func:`open_engine` but the name."""


def open_engine(
    name: str, model_dir: Path | str | None, dtype: str = "auto", threads: int = 1, slots: int = 8
) -> Engine:
    """Load a model and warm it up; takes as long as that takes.

    Args:
        name: a key of :data:`ENGINES`.
        model_dir: written by ``save_pretrained``, model and tokenizer. The echo engine needs none.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        threads: threads of this process that compute; more than it has CPUs makes them spin on each other.
        slots: the most requests that share a forward pass; more wait.

    Raises:
        UserError: no engine has this name, what it needs is not installed, or it cannot run this model.
    """
    target = ENGINES.get(name)
    if target is None:
        raise UserError(f"engine {name!r} is not known; allowed: {', '.join(ENGINES)}.")
    module, _, attribute = target.partition(":")
    engine: Engine = getattr(import_module(module), attribute)(model_dir, dtype=dtype, threads=threads, slots=slots)
    return engine
