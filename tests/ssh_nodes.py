"""Two nodes with networks of their own on one machine: network namespaces joined by a pair of virtual Ethernet devices,
an sshd in each. What a launcher must reach by address it cannot reach by the loopback, and hosts' ports do not meet.

Needs iproute2, openssh-server, pdsh, and root with the right to make namespaces. Keys and configuration are of one
folder.
"""

import os
import shutil
import subprocess
from pathlib import Path

PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
DEVICE = "wire"
SSHD_INSISTS_ON = Path("/run/sshd")  # an empty directory
SSH_PORT = 2222  # of namespaces that nobody else is in
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str:
    """What keeps nodes from being made here; empty where nothing does."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent or os.geteuid() != 0:
        return ", ".join(absent) or "root"
    probe = f"probe-{os.getpid()}"
    try:
        run(f"ip netns add {probe}")
        run(f"ip link add {probe[:12]} netns {probe} type veth peer name peer netns {probe}")
    except AssertionError as error:
        return f"the right to make network namespaces ({error})"
    finally:
        subprocess.run(["ip", "netns", "del", probe], env={**os.environ, "PATH": PATH}, capture_output=True)
    return ""


def run(line: str) -> str:
    done = subprocess.run(
        line, shell=True, env={**os.environ, "PATH": PATH}, text=True, capture_output=True, timeout=30
    )
    assert done.returncode == 0, f"{line}: {done.stderr.strip()}"
    return done.stdout


class Nodes:
    def __init__(self, directory: Path):
        self.directory, self.names = directory, [f"node{n}-{os.getpid()}" for n in (1, 2)]
        self.daemons, self.made = [], []

    def start(self):
        first, second = self.names
        for name in self.names:
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
        run(f"ip link add {DEVICE} netns {first} type veth peer name {DEVICE} netns {second}")
        for name, address in zip(self.names, ADDRESSES):
            run(f"ip -n {name} address add {address}/24 dev {DEVICE}")
            run(f"ip -n {name} link set {DEVICE} up")
        for key in ("host_key", "user_key"):
            run(f"ssh-keygen -q -t ed25519 -N '' -f {self.directory}/{key}")
        if not SSHD_INSISTS_ON.is_dir():
            SSHD_INSISTS_ON.mkdir()
            self.made.append(SSHD_INSISTS_ON)
        for name, address in zip(self.names, ADDRESSES):
            self.daemons.append(self.start_sshd(name, address))

    def start_sshd(self, name: str, address: str) -> subprocess.Popen:
        here, config = self.directory, self.directory / f"{name}.conf"
        lines = (
            f"Port {SSH_PORT}", f"ListenAddress {address}", f"HostKey {here}/host_key", "PidFile none", "UsePAM no",
            f"AuthorizedKeysFile {here}/user_key.pub", "StrictModes no", "PermitRootLogin yes", "LogLevel ERROR",
        )  # fmt: skip
        config.write_text("\n".join(lines) + "\n")
        # `ip netns exec` becomes the program itself, so the process is sshd.
        command = ["ip", "netns", "exec", name, shutil.which("sshd", path=PATH), "-D", "-e", "-f", str(config)]
        return subprocess.Popen(command, env={**os.environ, "PATH": PATH}, stderr=open(here / f"{name}.log", "w"))

    def stop(self):
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], env={**os.environ, "PATH": PATH}, capture_output=True)
        for empty in self.made:
            empty.rmdir()

    def on_first(self, command: str) -> str:
        """A shell line that runs `command` on the first node, with what ssh needs to reach both."""
        ssh = (
            f"-i {self.directory}/user_key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o "
            "LogLevel=ERROR"
        )
        return f"PATH=$PATH:/usr/sbin:/sbin PDSH_SSH_ARGS_APPEND='{ssh}' ip netns exec {self.names[0]} {command}"
