"""What a process pays for what it imports: only the one that holds a model loads torch."""

import subprocess
import sys

MODULES = (
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
)


def test_no_torch_without_a_model() -> None:
    """In one process, for a start takes longer than all of them; the first that loads something heavy is named."""
    code = f"""
import importlib, sys
for name in {MODULES!r}:
    importlib.import_module(f"serving.{{name}}")
    if heavy := {{"torch", "transformers", "mlflow", "vllm"}} & set(sys.modules):
        print(name, sorted(heavy))
        break
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
