"""A real SLURM on this machine: munge, slurmctld and two slurmd nodes of unlike features, all state in one folder.

Needs Debian's slurmctld, slurmd, slurm-client and munge, and root. Ports are asked of the system; what was started is
ended by process id.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = {"h100-0": "h100", "a100-0": "a100"}  # rank 0 of a mixed job is on the one that comes second in the alphabet
GPUS = 2


def missing() -> list[str]:
    """Programs that are not installed, or what else keeps a cluster from starting here."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return absent or ([] if os.geteuid() == 0 else ["root"])


class Cluster:
    def __init__(self, directory: Path):
        self.directory, self.config = directory, directory / "slurm.conf"
        for name in ("state", "log", "run", "munge", "socket", *(f"spool/{node}" for node in NODES)):
            (directory / name).mkdir(parents=True)
        for path in (directory, directory / "socket", *directory.parents[:-1]):
            path.chmod(path.stat().st_mode | 0o711)  # munged wants the way to its socket open
        (directory / "socket").chmod(0o755)
        (directory / "munge").chmod(0o700)
        self.write_configuration()

    def write_configuration(self):
        key = self.directory / "munge" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        here, port = self.directory, free_ports(1 + len(NODES))
        lines = [
            "ClusterName=test", f"SlurmctldHost={socket.gethostname().partition('.')[0]}(127.0.0.1)",
            f"SlurmctldPort={port[0]}", "SlurmUser=root", "SlurmdUser=root", "AuthType=auth/munge",
            # A requeued job waits for its credential to expire: two minutes unless told otherwise.
            f"AuthInfo=socket={here}/socket/munge.sock,cred_expire=5", "CredType=cred/munge",
            "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU", "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1", "SwitchType=switch/none",
            f"StateSaveLocation={here}/state", f"SlurmdSpoolDir={here}/spool/%n",
            f"SlurmctldPidFile={here}/run/slurmctld.pid", f"SlurmdPidFile={here}/run/slurmd-%n.pid",
            f"SlurmctldLogFile={here}/log/slurmctld.log", f"SlurmdLogFile={here}/log/slurmd-%n.log",
            "SlurmdParameters=config_overrides", "ReturnToService=2", "MpiDefault=none", "JobRequeue=1", "KillWait=30",
            "InactiveLimit=0", "AccountingStorageType=accounting_storage/none", "JobAcctGatherType=jobacct_gather/none",
            "GresTypes=gpu",
        ]  # fmt: skip
        for number, (node, kind) in enumerate(NODES.items()):
            lines.append(
                f"NodeName={node} NodeHostname={socket.gethostname().partition('.')[0]} NodeAddr=127.0.0.1 "
                f"Port={port[1 + number]} CPUs=16 RealMemory=4000 Gres=gpu:{kind}:{GPUS} Feature={kind}"
            )
        lines.append("PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        self.config.write_text("\n".join(lines) + "\n")
        (here / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (here / "gres.conf").write_text(
            "AutoDetect=off\n" + "".join(self.fake_gpus(node, kind) for node, kind in NODES.items())
        )

    def fake_gpus(self, node: str, kind: str) -> str:
        """SLURM hands out character devices: /dev/null's numbers under other names."""
        folder = self.directory / "dev" / node
        folder.mkdir(parents=True)
        for number in range(GPUS):
            os.mknod(folder / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        return f"NodeName={node} Name=gpu Type={kind} File={folder}/nvidia[0-{GPUS - 1}]\n"

    def start(self):
        here = self.directory
        run(
            f"munged --force --key-file={here}/munge/munge.key --socket={here}/socket/munge.sock "
            f"--pid-file={here}/munge/munged.pid --log-file={here}/munge/munged.log --seed-file={here}/munge/seed"
        )
        run(f"slurmctld -i -f {self.config}")
        for node in NODES:
            run(f"slurmd -N {node} -f {self.config}")
        self.wait_for(
            lambda: self.command("sinfo --noheader --Node --format %t").split().count("idle") == len(NODES), 60
        )

    def stop(self):
        for name in [*(f"run/slurmd-{node}.pid" for node in NODES), "run/slurmctld.pid", "munge/munged.pid"]:
            end_process(self.directory / name)

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        """The nodes' names are known to SLURM alone, so rank 0 is found on the loopback."""
        return {**base, "SLURM_CONF": str(self.config), "MASTER_ADDR": "127.0.0.1"}

    def command(self, line: str, **options) -> str:
        return run(line, env=self.environment(dict(os.environ)), **options)

    def submit(self, script: str, arguments: str, *, options: str = "", cwd: Path, environment: dict[str, str]) -> int:
        """The job's number."""
        line = f"sbatch --parsable {options} {script} {arguments}"
        return int(run(line, env=self.environment(environment), cwd=cwd))

    def states(self, job: int) -> set[str]:
        """Of the job, of all tasks of an array, or of all components of a mixed job."""
        return set(self.facts(job, "JobState"))

    def facts(self, job: int, name: str) -> list[str]:
        """What `scontrol show job` says of each task or component under this name."""
        words = self.command(f"scontrol show job {job}").split()
        return [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]

    def wait(self, job: int, seconds: float = 240) -> str:
        """The state, or states, in which it has ended for good: one that is requeued is pending or completing for a
        while."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
        self.wait_for(lambda: self.states(job) <= ended, seconds)
        return ", ".join(sorted(self.states(job)))

    def wait_for(self, condition, seconds: float):
        deadline = time.monotonic() + seconds
        while not condition():
            logs = [path.read_text(errors="replace")[-1500:] for path in sorted((self.directory / "log").iterdir())]
            assert time.monotonic() < deadline, "\n".join(["SLURM did not get there in time", *logs])
            time.sleep(0.2)


def run(line: str, *, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    env = dict(env or os.environ)
    env["PATH"] += ":/usr/sbin:/sbin"
    done = subprocess.run(line, shell=True, env=env, cwd=cwd, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def end_process(pid_file: Path):
    """SIGTERM, and SIGKILL after five seconds; gone when this returns."""
    if not pid_file.is_file():
        return
    pid = int(pid_file.read_text())
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
            for _ in range(50):
                time.sleep(0.1)
                os.kill(pid, 0)
        except ProcessLookupError:
            return
