"""What a process pays for what it imports: only the one that holds a model loads torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "arms",
        "api.openapi",
        "bench",
        "text",
        "ingress.door",
        "control.server",
        "arm_server",
        "deploy",
        "engines.base",
        "engines.answer",
        "engines.echo",
    ],
)
def test_no_torch_without_a_model(module: str) -> None:
    heavy = "{'torch', 'transformers', 'mlflow', 'vllm'} & set(sys.modules)"
    code = f"import sys, serving.{module}; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
