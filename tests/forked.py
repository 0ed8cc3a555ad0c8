"""Programs that start at once: forked by a process that has imported torch already.

`python tests/forked.py -m llama ...` does what `python -m llama ...` does, but for the seconds that
imports take; a script's path may stand in place of -m. Tests of starting, of signals while
importing, of terminals and of memory start Python itself. With a node's pid in the environment, it
runs on that node of `namespaces.network`.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESS, NODE = "LLAMA_TESTS_FORKED", "LLAMA_TESTS_NODE"
PYTHON = [sys.executable, "-S", "-E", __file__]


def client(words: list) -> int:
    """Hand over the program and the streams; its exit status. Signals are passed on."""
    job = {"words": words, "directory": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        socket.send_fds(server, [b"."], [0, 1, 2])
        lines = server.makefile("rw")
        print(json.dumps(job), file=lines, flush=True)
        pid = int(lines.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = int(lines.readline())
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


def enter(pid: int) -> None:
    """Move this process, which has one thread, to the network and the host name of a node, whose
    `pid` it is."""
    for kind in ("net", "uts"):
        with open(f"/proc/{pid}/ns/{kind}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"no way into the namespace {kind} of {pid}")


def be_program(job: dict, streams: list) -> int:
    """In the forked process: as Python itself would run it; its exit status.

    An error isn't caught: it ends this process as it would end Python, which takes its time.
    """
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    os.chdir(job["directory"])
    os.environ.clear()
    os.environ.update(job["environment"])
    if NODE in os.environ:
        enter(int(os.environ[NODE]))
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, sys.path[0] = job["words"], job["directory"]
    try:
        if sys.argv[0] == "-u":  # torchrun's: unbuffered
            del sys.argv[0]
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve(address: str, owner: int) -> None:
    """Fork a process for each client, until the owner's process has ended."""
    for name in (
        "llama.apps.completion", "llama.server.main", "llama.training.run", "torch._dynamo",
        "torch.distributed.run", "gguf", "matplotlib.figure",
    ):  # fmt: skip
        importlib.import_module(name)
    import psutil

    gc.freeze()  # or each process would look through all that is imported, and so copy it

    def tell(client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):  # it has gone
            client.sendall(f"{number}\n".encode())

    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(100)
    os.rename(f"{address}.new", address)  # from now on clients find it
    clients: dict = {}  # of each process
    while psutil.pid_exists(owner):
        ready, _, _ = select.select([listener, woken, *clients.values()], [], [], 5)
        if woken in ready:
            woken.recv(1000)
        for pid, connection in [*clients.items()]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                tell(connection, status)
                connection.close()
                del clients[pid]
            elif connection in ready:  # it has gone: so does what it ran
                for process in psutil.Process(pid).children(recursive=True):  # torchrun's ranks
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                os.kill(pid, signal.SIGKILL)
        if listener in ready:
            connection, _ = listener.accept()
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            text = connection.makefile().readline()
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in (listener, woken, wakes, connection, *clients.values()):
                    one.close()
                os._exit(be_program(json.loads(text), streams))
            for stream in streams:
                os.close(stream)
            tell(connection, pid)
            clients[pid] = connection


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path[0] = str(ROOT)
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(client(sys.argv[1:]))
