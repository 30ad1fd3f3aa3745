"""A real SLURM of one node with pretend GPUs, in a folder of its own; import the fixture `slurm`.

Needs no root, no systemd and no file outside of its folder: munge, slurmctld and slurmd run in the
foreground as this user, on free ports, and are stopped by their process ids.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

CLIENTS = ("sacct", "sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
MARK = "DYNATREE_TEST_SLURM"
"""Variable in the environment of slurmd and what it starts; holds the cluster's folder."""

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
# Without cgroups, as in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
# A node that registers again is taken back, for whatever reason it was down.
ReturnToService=2
# The node may have more cores in here than the machine has.
SlurmdParameters=config_overrides
# `squeue` still knows jobs that ended so many seconds ago.
MinJobAge=600
MpiDefault=none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=8000 Gres=gpu:h200:2 State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """The daemons and their folder.

    Attributes:
        bin: folder with the client commands, which find this cluster from any environment.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.config = folder / "slurm.conf"
        self.daemons = {}
        for name in ("bin", "state", "spool"):
            (folder / name).mkdir()
        host = socket.gethostname()
        values = {"host": host, "user": getpass.getuser(), "folder": folder, "ports": free_ports(2)}
        self.config.write_text(CONFIG.format(**values))
        # A GPU is a device file, and these are on every machine.
        gpus = [f"NodeName={host} Name=gpu Type=h200 File=/dev/{name}" for name in ("null", "zero")]
        (folder / "gres.conf").write_text("\n".join(gpus) + "\n")
        for name in CLIENTS:
            client = self.bin / name
            client.write_text(
                f'#!/bin/sh\nSLURM_CONF={self.config} exec {shutil.which(name)} "$@"\n'
            )
            client.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)

    def start(self) -> None:
        files = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        names = ("socket", "key", "pid", "log", "seed")
        options = [
            f"--{option}={self.folder}/munge.{name}"
            for option, name in zip(files, names, strict=True)
        ]
        self._run("munged", "--foreground", "--force", *options)
        wait_for(lambda: (self.folder / "munge.socket").exists(), "the socket of munge", self)
        self._run("slurmctld", "-D", "-c", "-f", str(self.config))
        self.start_node()

    def start_node(self) -> None:
        """Starts slurmd and waits until jobs can run."""
        self._run("slurmd", "-D", "-f", str(self.config))
        wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T") == "idle", "an idle node", self)

    def pull_node(self) -> None:
        """Kills slurmd and all that runs on the node, as when its power fails.

        The controller is told at once what it would find out when the node's time is over.
        """
        slurmd = self.daemons.pop("slurmd")
        on_node = [process for process in psutil.process_iter() if self._is_on_node(process)]
        slurmd.kill()
        slurmd.wait()
        for process in on_node:
            if process.is_running():
                process.kill()
        node = f"nodename={socket.gethostname()}"
        self.ask("scontrol", "update", node, "state=down", "reason=pulled")

    def stop(self) -> None:
        if "slurmd" in self.daemons:
            self.pull_node()
        for daemon in self.daemons.values():
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, client: str, *arguments: str) -> str:
        """What a client command prints."""
        done = subprocess.run(
            [self.bin / client, *arguments], capture_output=True, text=True, timeout=30
        )
        return done.stdout.strip()

    def running(self, rule: str) -> list[str]:
        """Ids of the jobs of a rule that run now; a task of an array is `<id>_<task>`."""
        lines = self.ask("squeue", "-h", "-r", "-t", "R", "-o", "%i %k").splitlines()
        jobs = dict(line.split(maxsplit=1) for line in lines)
        return [job for job, comment in jobs.items() if comment.startswith(f"rule_{rule}")]

    def logs(self) -> str:
        """The end of what each daemon wrote."""
        paths = sorted(self.folder.glob("*.out"))
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in paths)

    def _run(self, name: str, *arguments: str) -> None:
        command = shutil.which(name) or f"/usr/sbin/{name}"
        environment = os.environ | {"SLURM_CONF": str(self.config)}
        if name == "slurmd":
            environment[MARK] = str(self.folder)
        with (self.folder / f"{name}.out").open("a") as out:
            self.daemons[name] = subprocess.Popen(
                [command, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _is_on_node(self, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
        except psutil.Error:
            return False
        # A job has the environment that it was submitted from.
        job = "SLURM_JOB_ID" in environment and str(self.bin) in environment.get("PATH", "")
        return job or environment.get(MARK) == str(self.folder)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition, what: str, slurm: Slurm, seconds: float = 60):
    """Waits until `condition()` holds and returns what it gave."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s for {what}\n{slurm.logs()}")
        time.sleep(0.2)
    return value


@pytest.fixture(scope="session")
def slurm():
    # A path of its own, because that of a socket has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)
