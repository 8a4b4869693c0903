"""`stillhouse run`: one family from its spec to registered students and a comparison of their endpoints."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.dates import has_macros, rendered
from cluster.errors import NoPlaceError, RunError, StillhouseError, UserError, first_line
from cluster.evaluate.notices import at_the_end, before_start
from cluster.evaluate.result import FamilyResult
from cluster.preflight import Checked, preflight
from cluster.runs import SPEC_FILE, Run, last_run, open_run, run_of
from cluster.space import when_there_is_room
from cluster.spec import Event
from cluster.specfile import load_spec
from cluster.watch import Status
from jobs.console import Display, quiet
from jobs.lines import run_line
from jobs.notify import facts_of, notify
from jobs.promotion import champion_arms, promotion_lines, settle
from jobs.submit import FAMILY


def run(path: Path, overrides: Sequence[str], resume: bool, ds: date | None = None) -> None:
    """Check a family, run it and print what came of it.

    Args:
        path: the family's spec; with ``resume`` a run's name or folder will do, which keeps its spec and its text.
        ds: the date that ``corpus.paths`` is rendered for; none means today's, or that of the run that is resumed.

    Raises:
        StillhouseError: a mistake in what was given, or a run that could not go on.
    """
    named = run_of(str(path)) if resume and not path.is_file() else None
    spec = load_spec(named.folder / SPEC_FILE if named else path, overrides)
    begun = named or (last_run(spec.name) if resume else None)
    if ds is None:
        ds = date.fromisoformat(begun.ds) if begun and begun.ds else date.today()
    checked = preflight(
        rendered(spec, ds), begun.warm_start if begun else None, text_is_kept=begun is not None and begun.text_is_kept
    )
    teacher = f"{checked.teacher.fingerprint}/{checked.teacher.tokenizer}"
    folder = open_run(checked.spec, resume, ds, begun, teacher)
    signal.signal(signal.SIGTERM, _as_interrupt)
    with quiet(folder.log_path) as console:
        for line in checked.notices():
            console.print(line, highlight=False)
        line = run_line(folder.name, folder.log_path, ds if has_macros(spec) else None)
        try:
            result, serving = _run(checked, folder, console, line)
        except KeyboardInterrupt:
            # One that left the queue has no folder any more.
            command = f"jobs resume {job}" if (job := _job_name()) else f"run {path} --resume"
            again = f" Resume it with: stillhouse {command}" if folder.folder.exists() else ""
            console.print(f"interrupted; nothing of it is left running.{again}", highlight=False)
            if folder.mlflow:  # a student may have started
                _tell(console, checked, folder, "stopped")
            raise
        except (UserError, NoPlaceError):
            if _discard_empty(folder):  # its name and its log have been printed
                console.print(f"run {folder.name} and its log are removed: no student had started", highlight=False)
            raise
        except StillhouseError as error:
            _tell(console, checked, folder, "failed", error=str(error))
            raise
        except Exception as error:
            traceback.print_exc()  # into the log
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
            broken = f"the run broke off: {reason}; the whole of it is in {folder.log_path}"
            _tell(console, checked, folder, "failed", error=broken)
            raise RunError(broken) from error
        _print_result(console, checked, result, serving)
        trouble = result.trouble
        ended: Event = "failed" if trouble else "succeeded"
        wrong = "; ".join(trouble) or None
        _tell(console, checked, folder, ended, result, wrong)
        if any(verdict.promoted for verdict in result.verdicts.values()):
            _tell(console, checked, folder, ended, result, wrong, event="promoted")
    if trouble:
        raise RunError("; ".join(trouble))


def _job_name() -> str:
    """Name of the submitted job that this process is the driver of, as Ray's job server has given it; else empty."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {})
    return metadata.get("job_submission_id", "") if FAMILY in metadata else ""


def _tell(
    console: Console,
    checked: Checked,
    run: Run,
    ended: Event,
    result: FamilyResult | None = None,
    error: str | None = None,
    event: Event | None = None,
) -> None:
    """Tell the spec's webhook how the run ended; a line when that could not be done.

    Args:
        event: what it is told of; none means the end itself.
    """
    verdicts = promotion_lines(checked.spec, result) if result else []
    if line := notify(checked.spec.notify, event or ended, facts_of(checked, run, ended, result, error, verdicts)):
        console.print(line, highlight=False, markup=False)


def _as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _discard_empty(run: Run) -> bool:
    """Remove a run in which no student ever started: there is nothing to resume. Returns whether this removed it."""
    if run.mlflow or run.resumed or not run.folder.exists():
        return False
    shutil.rmtree(run.folder)
    with contextlib.suppress(OSError):  # the family has other runs
        run.folder.parent.rmdir()
    return True


def _run(checked: Checked, run: Run, console: Console, named: str) -> tuple[FamilyResult, list[dict[str, Any]]]:
    """The family's result and the comparison's rows.

    Args:
        named: the line that names the run and its log; printed once the family has its place, for both are removed
            when it gets none.
    """
    # Imported here, because they load Ray Data and MLflow, which a refused spec need not wait for.
    from cluster.evaluate.report import write_report
    from cluster.family import run_family
    from cluster.queue.place import place_for
    from cluster.records import latency_figures
    from cluster.registry import attach_report, log_figures
    from cluster.session import ray_session

    with Display(console) as display, contextlib.ExitStack() as held:
        try:
            held.enter_context(ray_session())
            # Ray has put its own in the place of ours, and would have the process exit on the spot.
            signal.signal(signal.SIGTERM, _as_interrupt)
            others = held.enter_context(place_for(checked.sized, display.show, checked.estimates))
        except (KeyboardInterrupt, StillhouseError):
            _discard_empty(run)
            raise
        console.print(named, highlight=False)
        result = run_family(checked, run, display.show, others=others)
        serving: list[dict[str, Any]] = []
        if checked.spec.serving is not None and result.versions:
            display.show(Status("comparing the endpoints"))
            # The students are trained and registered all the same.
            with _only_warned_of("the endpoints could not be compared", result):
                serving = compare(checked, result)
        if serving:
            with _only_warned_of("the latencies are not in MLflow; --resume measures them again", result):
                log_figures(checked.tracking_uri, latency_figures(checked.spec, run.mlflow, serving))
        settle(checked, result, serving)
        result.warnings += at_the_end(checked.spec, result)
        result.notices += before_start(checked.spec)
        again = f"make it with: stillhouse run {run.name} --resume"
        with _only_warned_of(f"the report {run.report_path} could not be written; {again}", result):
            write = partial(write_report, checked.spec, result, serving, environment())
            when_there_is_room(run.folder, write, checked.spec.patience_s)
        if run.report_path.exists():
            missing = f"the report is in {run.report_path} and not in MLflow; {again}"
            with _only_warned_of(missing, result):
                attach_report(checked.tracking_uri, run.mlflow[""], run.report_path)
    return result, serving


@contextlib.contextmanager
def _only_warned_of(what: str, result: FamilyResult) -> Iterator[None]:
    """Work after the students are registered, whose failure does not make the family a failed one."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()  # into the log
        reason = str(error) if isinstance(error, StillhouseError) else first_line(error)
        result.warnings.append(f"warning: {what}: {reason}")


def compare(checked: Checked, result: FamilyResult) -> list[dict[str, Any]]:
    """Serve the new challengers, and the teacher for reference, and send each the same prompts.

    Where latency decides on promotion, the champions are served beside them.

    Returns:
        One row per arm, see :meth:`serving.bench.BenchResult.rows`.
    """
    from cluster.queue.held import COMPARED
    from serving.arms import Arm
    from serving.bench import run_bench
    from serving.deploy import deploy, endpoint_of
    from serving.prompts import PROMPTS

    spec, options = checked.sized, checked.sized.serving
    assert options is not None
    registered = [name for name in result.students if name in result.versions]
    arms = [Arm(spec.model_name(n), f"models:/{spec.model_name(n)}/{result.versions[n]}", 1.0) for n in registered]
    arms += [Arm(name, source, 0.0) for name, source in champion_arms(spec, result).items()]
    if options.include_teacher:
        arms.append(Arm("teacher", checked.teacher.folder, 0.0))
    # Not the family's name, which an endpoint that is running on the cluster may have.
    per_arm = {"cpus": options.cpus_per_arm, "gpus": options.gpus_per_arm, "memory": options.memory_per_arm}
    endpoint_spec = endpoint_of(arms, name=COMPARED + result.run.name, port=0, **per_arm)
    with deploy(endpoint_spec, checked.tracking_uri) as endpoint:
        bench = run_bench(
            endpoint.url,
            requests=options.requests,
            concurrency=options.concurrency,
            max_tokens=options.max_tokens,
            prompts=PROMPTS,
            models=[arm.name for arm in arms],
        )
    return bench.rows()


def environment() -> dict[str, str]:
    """What a run ran on, for the report."""
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("stillhouse", "ray", "torch", "deepspeed", "transformers", "mlflow")}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"
    return {"machine": machine, "python": platform.python_version(), **libraries}


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _print_result(
    console: Console, checked: Checked, result: FamilyResult, serving: Sequence[Mapping[str, Any]]
) -> None:
    spec = checked.spec
    by_arm = {row["arm"]: row for row in serving}
    table = Table(title=f"family {spec.name}: {len(result.students)} students from one pass", title_justify="left")
    columns = ["", "parameters", "KL before", "KL after", "agreement", "perplexity", "registered"]
    for column in columns + (["first token p50 ms", "answer p50/p95 ms"] if serving else []):
        table.add_column(column, justify="right" if column else "left")

    def latency(arm: str) -> list[str]:
        row = by_arm.get(arm)
        if row is None:
            return ["", ""] if serving else []
        if not row["latency_ms"]:
            return ["no answer", "no answer"]
        return [
            f"{row['first_token_ms']['p50']:.0f}",
            f"{row['latency_ms']['p50']:.0f}/{row['latency_ms']['p95']:.0f}",
        ]

    for name, student in result.students.items():
        model = spec.model_name(name)
        table.add_row(
            name,
            f"{student.parameters / 1e6:.1f} M",
            f"{student.before.kl:.2f}",
            f"{student.after.kl:.2f}",
            f"{100 * student.after.agreement:.0f} %",
            f"{student.after.student_perplexity:.4g}",
            f"{model} v{result.versions[name]}" if name in result.versions else "not registered",
            *latency(model),
        )
    if result.students:
        after = next(iter(result.students.values())).after
        table.add_row("teacher", "", "", "0.00", "100 %", f"{after.teacher_perplexity:.4g}", "", *latency("teacher"))
    console.print(table)
    scorings = sum(result.stats.scored.values())
    kept = f", {len(result.stats.read)} came from the label store" if result.stats.read else ""
    if (pool := result.stats.pool).grown:
        kept += f"; its pool grew by a replica {_times(pool.grown)} and gave one back {_times(pool.shrunk)}"
    console.print(
        f"the teacher scored {len(result.stats.scored)} batches in {scorings} scorings{kept}; read by "
        + ", ".join(f"{name} {count}" for name, count in result.stats.delivered.items()),
        highlight=False,
    )
    corpus = [f"corpus: {line}" for line in result.corpus.lines()]
    for line in [*corpus, *before_start(spec), *promotion_lines(spec, result)]:
        console.print(line, markup=False, highlight=False)
    for line in result.warnings:
        console.print(line, markup=False, highlight=False)
    console.print(f"MLflow {checked.tracking_uri}\nreport {result.run.report_path}", highlight=False)
