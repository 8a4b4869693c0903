"""Estimated against measured peak memory of student ranks and of a teacher, one process each as Ray would start it.

``python benchmarks/memory.py`` trains a random Llama of some 100 million parameters for two steps under ZeRO 1, 2 and
3, on 1 and 2 ranks, with and without gradient checkpointing, and has the teacher of the same shape score a batch. On a
CPU the measure is the largest resident set (VmHWM), on a GPU ``torch.cuda.max_memory_allocated``. ``--base`` measures
the processes alone, which :mod:`cluster.memory` has as constants.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from common import arguments, write

from cluster.corpus.batches import Batch
from cluster.memory import MIB, Estimate, Shape, shape_of, student_estimate, teacher_estimate
from cluster.spec import CorpusSpec, StudentSpec, TeacherSpec, TopKLabels

# (layers, hidden, intermediate, heads, key-value heads, vocabulary): the formulas were worked out with the first only.
SHAPES = {
    "98M": (12, 768, 2048, 12, 12, 8192),
    "wide vocabulary": (4, 512, 1536, 8, 2, 65536),
    "narrow and deep": (30, 320, 1024, 5, 5, 16384),
}
STEPS, ACCUMULATED = 2, 2
# What a process imports before it has a model, by role.
BASES = {
    "teacher shard": "import ray, torch, cluster.teacher.shard, cluster.packing, cluster.loading; "
    "from transformers import LlamaForCausalLM",
    "student rank": "import deepspeed, cluster.students.loop; from transformers import LlamaForCausalLM",
    "serving arm": "import ray.serve, serving.arm_server, serving.engines.transformers; "
    "from transformers import LlamaForCausalLM",
    "Ray Train controller": "import ray.train.torch, cluster.students.trainer",
    "MLflow registry": "import ray, cluster.registry.client, mlflow",
    "Serve control and door": "import serving.control.server, serving.ingress.door, ray.serve",
    "driver and stream": "import jobs.run, cluster.family, cluster.queue.place",
}


def config_of(name: str) -> Any:
    """A Llama's configuration by the name of its shape."""
    from transformers import LlamaConfig

    layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=None,
    )


def peak_bytes(on_gpu: bool) -> int:
    """The largest resident set of this process so far, or what torch has had allocated of the GPU."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def batch_of(sequences: int, length: int, vocabulary: int, packed: bool = True) -> Batch:
    """Random tokens, two documents to a sequence."""
    tokens_BS = np.random.default_rng(0).integers(0, vocabulary, (sequences, length)).astype(np.int32)
    mask_BS = np.ones(tokens_BS.shape, dtype=np.bool_)
    mask_BS[:, -1] = False
    positions_BS = np.tile(np.arange(length, dtype=np.int32) % (length // 2), (sequences, 1))
    return Batch(0, tokens_BS, mask_BS, positions_BS, "0" * 32)


def train(row: dict[str, Any]) -> int:
    """One rank: what :mod:`cluster.students.loop` does with a batch, without Ray; the peak in bytes."""
    import deepspeed
    import torch.distributed as dist

    import cluster.students.loop  # noqa: F401  (what a rank imports)
    from cluster.memory import keep_memory
    from cluster.students.initial import initial_student
    from cluster.students.losses.fused import distillation_loss
    from cluster.students.losses.objective import Objective
    from cluster.students.losses.targets import BucketTargets
    from cluster.students.module import Student, inputs_of
    from cluster.students.zero import adamw, reduce_nothing, schedule_of, use_plain_gloo, zero_config

    student = StudentSpec.model_validate(row["student"])
    on_gpu = student.gpus_per_rank > 0
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        use_plain_gloo()
        keep_memory()
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    dtype = torch.bfloat16 if student.precision == "bfloat16" else torch.float32
    model = initial_student(student.init, teacher_dir=row["folder"], student_dir=None, dtype=dtype).to(device)
    model.train()
    if student.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    module, sequences = Student(model, "masked"), student.ranks * student.micro_batch * ACCUMULATED
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw(module, student),
        lr_scheduler=schedule_of(student, STEPS),
        config=zero_config(student, sequences),
        dist_init_required=False,
    )
    if student.ranks == 1:
        reduce_nothing(engine)
    vocabulary = model.config.vocab_size
    inputs = inputs_of(batch_of(student.micro_batch, row["length"], vocabulary), device)
    tokens = len(inputs.next_T)
    ids_TK = torch.randint(0, vocabulary, (tokens, 64), device=device)
    logprobs_TK = torch.full((tokens, 64), -4.3, device=device)
    target = BucketTargets(inputs.next_T, ids_TK, logprobs_TK, torch.full((tokens,), -2.5, device=device))
    use = partial(distillation_loss, target=target, objective=Objective(0.1, 0.9, 1.0), vocabulary=vocabulary)
    for _ in range(STEPS * ACCUMULATED):
        loss, _sums = engine(inputs, use)
        engine.backward(loss / tokens)
        engine.step()
    return peak_bytes(on_gpu)


def score(row: dict[str, Any]) -> int:
    """One shard: load the teacher, probe it and label a batch; the peak in bytes."""
    from cluster.models import TeacherModel
    from cluster.teacher.shard import Shard

    spec = TeacherSpec.model_validate(row["teacher"])
    vocabulary = SHAPES[row["shape"]][-1]
    model = TeacherModel(row["folder"], vocabulary, "0" * 16, "1" * 16, packing="masked")
    shard = Shard(spec, TopKLabels(), model, 1, int(os.environ["RANK"]))
    shard.join(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    shard.probe()
    for _ in range(2):
        shard.score(batch_of(row["sequences"], row["length"], vocabulary))
    return peak_bytes(spec.gpus_per_shard > 0)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work(row: dict[str, Any], environment: dict[str, str], answer: Any) -> None:
    """One process: do a row's work and report its peak."""
    os.environ.update(environment)
    os.dup2(2, 1)  # what the libraries print is not part of the table
    answer.send(train(row) if "student" in row else score(row))


def measured(row: dict[str, Any], ranks: int) -> int:
    """The peak of the process that needs most of the ``ranks`` that do a row's work.

    On a CPU they are forked off this one, which has imported what they need: its pages count as theirs, as they would
    if each had imported them itself. CUDA does not work in forked processes.
    """
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    workers, answers = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe(duplex=False)
        environment = {**everywhere, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        worker = context.Process(target=work, args=(row, environment, theirs))
        worker.start()
        theirs.close()
        workers.append(worker)
        answers.append(mine)
    peaks = [int(answer.recv()) for answer in answers]
    for worker in workers:
        worker.join()
    return max(peaks)


Row = tuple[str, dict[str, Any], int, Estimate]


def student_rows(args: argparse.Namespace, shape: Shape, folder: str) -> Iterator[Row]:
    """Of every student that is measured its name, what its ranks are given, how many they are, and the estimate."""
    names = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads")
    init = {"source": "scratch", **dict(zip(names, SHAPES[args.shape], strict=False))}
    corpus = CorpusSpec(paths=["-"], sequence_length=args.length)
    for precision, ranks, stage, again in product(args.precision, args.ranks, args.stages, (False, True)):
        tree = {
            "init": init,
            "zero_stage": stage,
            "ranks": ranks,
            "micro_batch": args.micro_batch,
            "precision": precision,
            "gradient_checkpointing": again,
            "gpus_per_rank": float(torch.cuda.is_available()),
        }
        name = f"ZeRO-{stage}, {precision}, {ranks} rank{'s' * (ranks > 1)}" + ", checkpointing" * again
        estimate = student_estimate(shape, StudentSpec.model_validate(tree), corpus)
        yield name, {"student": tree, "folder": folder, "length": args.length}, ranks, estimate


def teacher_rows(args: argparse.Namespace, shape: Shape, folder: str) -> Iterator[Row]:
    """The same of the teacher."""
    corpus = CorpusSpec(paths=["-"], sequence_length=args.length)
    for dtype in args.precision:
        tree = {"model": folder, "dtype": dtype, "gpus_per_shard": float(torch.cuda.is_available())}
        sizes = {"shape": args.shape, "length": args.length, "sequences": corpus.batch_sequences}
        estimate = teacher_estimate(shape, TeacherSpec.model_validate(tree), corpus)
        yield f"teacher, {dtype}", {"teacher": tree, "folder": folder, **sizes}, 1, estimate


def base() -> None:
    """Print the resident set of every kind of process after its imports."""
    for name, code in BASES.items():
        program = f"{code}\nprint(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        print(f"{name}: {int(done.stdout.split()[-2]) / 1024:.0f} MiB", flush=True)


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__ or "", threads=False)
    parser.add_argument("--shape", choices=SHAPES, default="98M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precision", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--only", help="measure the rows whose name contains this")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--base", action="store_true", help="measure the processes without a model")
    args = parser.parse_args()
    if args.base:
        base()
        return
    if not torch.cuda.is_available():
        importlib.import_module("deepspeed")
        importlib.import_module("cluster.students.loop")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", SAVE, folder, args.shape], check=True)
        figures = []
        print(f"| {args.shape} | estimated MiB | measured MiB | ratio | largest parts |\n|---|---|---|---|---|")
        shape = shape_of(config_of(args.shape), "shape")
        for name, row, ranks, estimate in (*student_rows(args, shape, folder), *teacher_rows(args, shape, folder)):
            if args.only and args.only not in name:
                continue
            peak = measured(row, ranks)
            parts = ", ".join(f"{part} {size / MIB:.0f}" for part, size in estimate.parts.items() if size)
            sizes = f"{estimate.total / MIB:.0f} | {peak / MIB:.0f} | {estimate.total / peak:.2f}"
            print(f"| {name} | {sizes} | {parts} |", flush=True)
            figures.append({"row": name, "estimated": estimate.total, "measured": peak})
    write(args.out, "memory", figures)


# In a process of its own, whose memory is not this one's.
SAVE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import memory, torch
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
AutoModelForCausalLM.from_config(memory.config_of(sys.argv[2]), dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""

if __name__ == "__main__":
    main()
