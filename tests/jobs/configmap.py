"""A ConfigMap as a pod finds it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any


def mount(config: dict[str, Any], volume: dict[str, Any], folder: Path) -> Path:
    """Lay a volume's files out as the kubelet does: behind links, so that all of them change at once.

    Returns:
        The folder where the container has them.
    """
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    version = folder / "..2026_11_24"
    for item in volume["configMap"]["items"]:
        path = version / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = config["data"].get(item["key"])
        path.write_bytes(base64.b64decode(config["binaryData"][item["key"]]) if text is None else text.encode())
    (folder / "..data").symlink_to(version.name)
    for name in sorted({Path(item["path"]).parts[0] for item in volume["configMap"]["items"]}):
        (folder / name).symlink_to(f"..data/{name}")
    return folder
