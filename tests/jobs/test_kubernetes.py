"""A family as a RayJob: what its objects hold, what is refused, and the real kubectl that creates them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.corpus.files import select_files
from cluster.errors import UserError
from cluster.specfile import load_spec
from jobs import kubernetes
from jobs.cli.main import main
from jobs.contexts import Context
from tests.jobs.api_server import api_server
from tests.jobs.configmap import mount
from tests.tiny import tiny_family, write_tiny_corpus

PLACE = kubernetes.Place(image="registry.example.com/stillhouse/cpu:0.1.0", namespace="ml", token_secret="ray")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    tree = tiny_family("/models/teacher", "corpus.jsonl")
    tree["corpus"]["paths"] = ["corpus.jsonl", "texts", "s3://bucket/dt={{ ds }}/"]
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """The command line; its kubectl is the real one, and finds no cluster unless told where."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setenv("KUBECONFIG", "/dev/null")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STILLHOUSE_CONFIG", str(tmp_path / "config.yaml"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", "submit", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def objects(spec: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config, job = kubernetes.manifests(spec, [], None, PLACE, **options).objects
    return config, job


def test_the_job_has_the_files_and_says_who_it_is(spec: Path, tmp_path: Path) -> None:
    config, job = objects(spec, name="first", ds=date(2026, 11, 24))
    facts = job["spec"]
    assert facts["clusterSelector"] == {"ray.io/cluster": "stillhouse"}
    assert facts["entrypoint"] == "python -m jobs run family.yaml --ds 2026-11-24"
    assert facts["jobId"] == job["metadata"]["name"] == config["metadata"]["name"] == "first"
    assert facts["metadata"]["stillhouse.family"] == "tiny" and facts["metadata"]["stillhouse.ds"] == "2026-11-24"
    pod = facts["submitterPodTemplate"]["spec"]
    assert (
        yaml.safe_load(facts["runtimeEnvYAML"])["working_dir"] == pod["containers"][0]["volumeMounts"][0]["mountPath"]
    )
    token = next(each for each in pod["containers"][0]["env"] if each["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"] == {"secretKeyRef": {"name": "ray", "key": "auth_token"}}

    folder = mount(config, pod["volumes"][0], tmp_path / "mounted")
    there = load_spec(folder / "family.yaml")
    *local, bucket = there.corpus.paths
    assert bucket == "s3://bucket/dt=2026-11-24/"
    assert Path(local[0]).read_text() == (tmp_path / "corpus.jsonl").read_text()
    (text,) = select_files(local[1:]).files
    assert Path(text).read_bytes() == b"caf\xe9"


def test_a_resumed_run_keeps_its_date_and_has_to_be_given_one_where_paths_have_macros(spec: Path) -> None:
    with pytest.raises(UserError, match="--resume: give the date of the run by --ds"):
        objects(spec, resume=True)
    _, job = objects(spec, resume=True, ds=date(2026, 11, 24))
    assert job["spec"]["entrypoint"] == "python -m jobs run family.yaml --resume --ds 2026-11-24"
    assert job["spec"]["metadata"].keys() == {"stillhouse.family", "stillhouse.user"}


def test_a_context_says_where_runs_are_kept_and_none_says_nothing(spec: Path) -> None:
    lab = Context(address="http://lab:8265", tracking_uri="http://mlflow:5000")
    for context, uri in ((lab, "http://mlflow:5000"), (None, None)):
        config, _ = kubernetes.manifests(spec, [], context, PLACE).objects
        (text,) = (each for each in config["data"].values() if each.startswith("name: tiny"))
        assert yaml.safe_load(text).get("tracking", {}).get("uri") == uri


def test_what_does_not_fit_into_a_config_map_is_refused_with_what_to_do(spec: Path) -> None:
    (spec.parent / "corpus.jsonl").write_bytes(b"x" * kubernetes.LARGEST)
    with pytest.raises(UserError, match=r"1\.0 MiB with the spec; a ConfigMap holds 1 MiB; .* s3://"):
        objects(spec)


@pytest.mark.parametrize("name", ["", "Upper", "under_score", "1st", "end-", "x" * 48])
def test_a_name_that_kubernetes_would_refuse_is_refused(spec: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        objects(spec, name=name)


def test_a_long_family_s_job_has_a_name_of_its_own(spec: Path) -> None:
    tree = yaml.safe_load(spec.read_text()) | {"name": "f" * 40}
    spec.write_text(yaml.safe_dump(tree))
    _, job = objects(spec)
    assert len(job["metadata"]["name"]) == kubernetes.LONGEST_NAME


def test_a_user_s_name_cannot_write_into_kuberay_s_command_line(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", 'eve"$(id)`id`')
    _, job = objects(spec)
    assert job["spec"]["metadata"]["stillhouse.user"] == "eve___id__id_"
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]["STILLHOUSE_USER"] == "eve___id__id_"


def test_options_without_effect_are_refused(run: Run, spec: Path) -> None:
    lone = {"--image": "i:1", "--namespace": "n", "--cluster": "c", "--token-secret": "s", "--dry-run": None}
    for option, value in lone.items():
        code, _, err = run(str(spec), option, *([value] if value else []))
        assert (code, err.count("\n")) == (2, 1)
        assert f"{option} has no effect without --kubernetes" in err
    for given in (["--address", "http://lab:1"], ["--env", "A=b"], ["--follow"], ["--no-follow"]):
        code, _, err = run(str(spec), "--kubernetes", "--image", "i:1", *given)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{given[0].replace('--no-', '--')} has no effect with --kubernetes" in err
    code, _, err = run(str(spec), "--kubernetes")
    assert (code, err.count("\n")) == (2, 1) and "--kubernetes needs --image" in err


def test_a_dry_run_prints_what_kubectl_reads_and_asks_no_cluster(run: Run, spec: Path, tmp_path: Path) -> None:
    code, out, err = run(str(spec), "--kubernetes", "--image", "i:1", "--cluster", "lab", "--dry-run")
    assert (code, err) == (0, "")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.yaml").write_text(out)
    (tmp_path / "job" / "kustomization.yaml").write_text("resources: [job.yaml]\n")
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path / "job")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    config, job = yaml.safe_load_all(done.stdout)
    assert [config, job] == list(yaml.safe_load_all(out))
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "lab"}
    # KubeRay keeps a cluster's token under the cluster's name.
    assert "name: lab" in yaml.safe_dump(job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["env"])


def test_kubectl_creates_both_objects_or_none(
    run: Run, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = (str(spec), "--kubernetes", "--image", "i:1", "--namespace", "ml", "--name", "first")
    with api_server(tmp_path) as (server, config):
        monkeypatch.setenv("KUBECONFIG", str(config))
        code, out, err = run(*wanted)
        assert code == 0, err
        assert "kubectl -n ml logs -f job/first" in out
        assert [each["kind"] for each in server.objects] == ["ConfigMap", "RayJob"]
        assert server.dry_runs == 2
        code, _, err = run(*wanted)
        assert (code, err.count("\n")) == (2, 1) and "there is a 'first' in ml already" in err
    with api_server(tmp_path, kuberay=False) as (server, config):
        code, _, err = run(*wanted)
        assert (code, err.count("\n"), server.objects) == (1, 1, [])
        assert "install the KubeRay operator" in err


def test_a_cluster_that_is_not_there_and_a_kubectl_that_is_not_there_cost_a_line(
    run: Run, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run(str(spec), "--kubernetes", "--image", "i:1")
    assert (code, err.count("\n")) == (1, 1) and "connection refused" in err
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = run(str(spec), "--kubernetes", "--image", "i:1")
    assert (code, err.count("\n")) == (2, 1) and "kubectl is not here" in err
