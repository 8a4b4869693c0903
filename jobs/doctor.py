"""`stillhouse doctor`: what a machine or a cluster has, and what is missing for which command."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from cluster.specfile import home
from jobs.contexts import Context
from jobs.tables import plain_console

# What each command needs beyond the light base.
NEEDS = {
    "run": ("torch", "transformers", "deepspeed", "mlflow", "pyarrow"),
    "serve": ("torch", "transformers", "uvicorn", "httpx", "mlflow"),
    "bench": (),
    "submit": (),
}
GIB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One line of the screenful. ``missing`` names the commands that cannot work because of it."""

    what: str
    found: str
    good: bool = True
    missing: str = ""


def doctor(context: Context | None) -> int:
    """Print the findings on this machine, or on a cluster. Returns 0 when nothing is missing, else 1."""
    findings = _cluster(context) if context else _machine()
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = Text("ok", style="green") if finding.good else Text("--", style="red")
        table.add_row(mark, finding.what, finding.found, finding.missing)
    plain_console().print(table)
    return 0 if all(f.good for f in findings) else 1


def _machine() -> list[Finding]:
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    findings = [Finding("python", platform.python_version(), good, "" if good else "needs 3.11 or 3.12")]
    for name in ("ray", "torch", "transformers", "deepspeed", "mlflow", "pyarrow", "uvicorn", "httpx"):
        findings.append(_package(name))
    return [*findings, _device(), _zero(), _cpus(), _disk(), _shared_memory(), *map(_port, (8000, 8265)), _token()]


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        commands = ", ".join(command for command, needed in NEEDS.items() if name in needed)
        extra = "serve" if name in ("uvicorn", "httpx") else "train"
        return Finding(name, "not installed", False, f"for {commands}: pip install 'stillhouse[{extra}]'")


def _probe(code: str) -> str:
    """The last line that a fresh interpreter prints; empty when it fails. Keeps heavy, chatty imports out of here."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else ""


def _device() -> Finding:
    code = (
        "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "print(f'{n} x {torch.cuda.get_device_name(0)}' if n else 'CPU only')"
    )
    found = _probe(code)
    return Finding("torch device", found or "torch does not load", bool(found), "" if found else "for run, serve")


def _zero() -> Finding:
    code = (
        "import deepspeed; from deepspeed.accelerator import get_accelerator as g; "
        "ops = [n for n, ok in deepspeed.ops.__compatible_ops__.items() if ok]; "
        "print(f'on {g().device_name()}; can build {len(ops)} ops, Stillhouse needs none')"
    )
    found = _probe(code)
    return Finding("deepspeed ops", found or "deepspeed does not load", bool(found), "" if found else "for run")


def _cpus() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    compiler = shutil.which("g++") or shutil.which("clang++")
    return Finding("machine", f"{os.cpu_count()} CPUs, {memory:.0f} GiB, compiler {compiler or 'none (not needed)'}")


def _disk() -> Finding:
    folder = next(p for p in (home(), *home().parents) if p.exists())
    free = shutil.disk_usage(folder).free / GIB
    return Finding("disk", f"{free:.0f} GiB free for {home()}", free > 5, "" if free > 5 else "for run: 5 GiB or more")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    free = shutil.disk_usage(folder).free / GIB if folder.exists() else 0.0
    good = free > 2.5
    return Finding("shared memory", f"{free:.1f} GiB free in {folder}", good, "" if good else "run is slower below 2.5")


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        free = probe.connect_ex(("127.0.0.1", port)) != 0
    return Finding(f"port {port}", "free" if free else "in use: an endpoint or a Ray cluster is up here")


def _token() -> Finding:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("token", "in RAY_AUTH_TOKEN")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    found = f"in {path}" if path.is_file() else "none; submit to a cluster with authentication needs one"
    return Finding("token", found)


def _cluster(context: Context) -> list[Finding]:
    from jobs.client import connect

    client = connect(context)
    findings = [Finding("ray here", version("ray")), Finding("job server", f"answers at {context.address}")]
    from ray.util.state import list_nodes

    for node in list_nodes(address=client.get_address()):
        resources = {k: v for k, v in node.resources_total.items() if k in ("CPU", "GPU")}
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
        memory = node.resources_total.get("memory", 0) / GIB
        findings.append(Finding(f"node {node.node_ip}", f"{node.state.lower()}: {amounts}, {memory:.0f} GiB"))
    return findings
