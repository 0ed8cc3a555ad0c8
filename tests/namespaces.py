"""Machines on a network, made of Linux namespaces: for what needs several nodes.

    with network(3) as nodes:
        head = nodes[0].popen(["python", "server.py", nodes[0].address])
        nodes[2].popen(["python", "client.py", nodes[0].address])
        nodes[2].cut()  # pulls its cable

A node has a host name (node0, node1, ...), an interface eth0 with an address (10.0.0.1, 10.0.0.2,
...), a loopback interface and processes of its own; its files, and the cores, are this machine's.
The nodes reach each other and nothing else. When the context ends, or this process dies, all
processes of the nodes are killed, and with them the namespaces go.

It takes root's rights (in a container: CAP_SYS_ADMIN and CAP_NET_ADMIN), util-linux and iproute2.
"""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Sequence

import psutil
import pytest

INTERFACE = "eth0"
MACHINE = ["--net", "--uts", "--ipc", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]


class _Keeper:
    """Namespaces that live as long as a process in them, which ends when this one closes a pipe."""

    def __init__(self, options: Sequence[str], setup: str):
        command = ["unshare", *options, "sh", "-ec", f"{setup}\necho ready\nexec cat"]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            self.process = subprocess.Popen(command, text=True, **pipes)
        except OSError as error:
            _refuse(str(error))
        if self.process.stdout.readline() != "ready\n":
            _refuse(self.process.communicate()[1])
        inside = psutil.Process(self.process.pid).children()  # with --fork
        self.pid = inside[0].pid if inside else self.process.pid

    def end(self) -> None:
        self.process.communicate()  # closes the pipe; the kernel kills what is left there


def _refuse(why: str) -> None:
    pytest.fail(
        f"no network namespaces here ({' '.join(why.split())}): run the tests as root, in a "
        "container with CAP_SYS_ADMIN and CAP_NET_ADMIN, with util-linux and iproute2 installed",
        pytrace=False,
    )


class Node:
    """One of the machines of `network`.

    Attributes:
        address: its IPv4 address.
        name: its host name.
        pid: of the process that keeps its namespaces.
    """

    def __init__(self, index: int, switch: _Keeper):
        self.address, self.name = f"10.0.0.{index + 1}", f"node{index}"
        self._switch, self._port = switch, f"port{index}"
        self._keeper = _Keeper(MACHINE, f"hostname {self.name}\nip link set lo up")
        self.pid = self._keeper.pid
        self._started: List[subprocess.Popen] = []

    def _plug_in(self) -> None:
        port = self._port
        self._at_switch("add", port, "type", "veth", "peer", INTERFACE, "netns", self.pid)
        self._at_switch("set", port, "master", "switch", "up")
        setup = f"ip address add {self.address}/24 dev {INTERFACE} && ip link set {INTERFACE} up"
        subprocess.run(self._command(["sh", "-c", setup]), check=True)

    def _at_switch(self, *command: object) -> None:
        enter = ["nsenter", "--net", "-t", self._switch.pid, "ip", "link", *command]
        done = subprocess.run([*map(str, enter)], capture_output=True, text=True)
        if done.returncode:
            _refuse(done.stderr)

    def _command(self, command: Sequence[str | Path], cwd: str | Path = ".") -> List[str]:
        enter = ["nsenter", "--net", "--uts", "--ipc", "--pid", "--mount", "-t", self.pid]
        return [*map(str, [*enter, "env", f"--chdir={Path(cwd).resolve()}", *command])]

    def popen(
        self, command: Sequence[str | Path], cwd: str | Path = ".", **options: Any
    ) -> subprocess.Popen:
        """Start a command on this node; options are those of `subprocess.Popen`.

        The process that is returned only waits for the command and takes its exit status: use
        `processes` to find what it has started, and `kill` to end it all.
        """
        process = subprocess.Popen(self._command(command, cwd), **options)
        self._started.append(process)
        return process

    def run(self, command: Sequence[str | Path], cwd: str | Path = ".", **options: Any) -> Any:
        """`subprocess.run` on this node."""
        return subprocess.run(self._command(command, cwd), **options)

    def processes(self) -> List[psutil.Process]:
        """All that runs on this node, by the ids that they have on this machine."""
        namespace = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            try:
                same = os.stat(f"/proc/{process.pid}/ns/pid").st_ino == namespace
            except OSError:  # it has ended
                continue
            if same and process.pid != self.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def cut(self) -> None:
        """Cut this node off from the network."""
        self._at_switch("set", self._port, "down")

    def restore(self) -> None:
        """Undo `cut`."""
        self._at_switch("set", self._port, "up")

    def _end(self) -> None:
        self._keeper.end()
        for process in self._started:
            process.wait()


@contextmanager
def network(n: int) -> Iterator[List[Node]]:
    """n nodes, at 10.0.0.1 and so on, on one network.

    Without the rights or the commands that it takes, the test fails with a line that says so.
    """
    ends = []
    try:
        switch = _Keeper(["--net"], "ip link add switch type bridge\nip link set switch up")
        ends.append(switch.end)
        nodes = []
        for index in range(n):
            nodes.append(Node(index, switch))
            ends.append(nodes[-1]._end)
            nodes[-1]._plug_in()
        yield nodes
    finally:
        for end in reversed(ends):
            end()
