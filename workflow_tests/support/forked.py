"""A stand-in for the Python interpreter that starts in a tenth of the time: a fork of one with its libraries imported.

A run of the small screen starts some thirty processes, and each of them imports for three seconds. Random sequences
of runs would take a night. Snakemake and the scripts are the real ones; nothing of this package is imported before the
fork.

    with interpreter() as python: subprocess.run([python, "-m", "snakemake", ...])
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = (
    "numpy", "pandas", "threadpoolctl", "scipy.sparse", "scipy.stats", "sklearn.ensemble", "sklearn.linear_model",
    "anndata", "scanpy", "h5py", "numba", "torch",
    "pytorch_lightning", "matplotlib.pyplot", "pyarrow.parquet", "jinja2", "yaml", "jsonschema", "requests",
    "snakemake.cli", "snakemake.api",
    "snakemake.script", "snakemake.executors.local", "snakemake_executor_plugin_slurm",
)  # fmt: skip
# Libraries read these when they are loaded; a fork is told of its own number (`_answer`).
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Started in place of Python: hands its command line, environment and streams to the server, and waits for the exit
# status. What is neither a script nor Snakemake is left to Python itself.
CLIENT = """#!{python} -ISE
import json, os, signal, socket, sys
words = [word for word in sys.argv[1:] if word not in ("-u", "-B")]
if not words or (words[0].startswith("-") and words[:2] != ["-m", "snakemake"]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(call).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(call)
for number in {signals}:
    signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
answer = connection.recv(4)
sys.exit(int.from_bytes(answer, "big") if len(answer) == 4 else 137)
"""


@contextlib.contextmanager
def interpreter() -> Iterator[str]:
    """Yield the path of the stand-in; it works while the block lasts."""
    with tempfile.TemporaryDirectory() as folder:
        address, client = f"{folder}/socket", Path(folder, "python")
        client.write_text(
            CLIENT.format(python=sys.executable, address=address, signals=[int(number) for number in SIGNALS])
        )
        client.chmod(client.stat().st_mode | stat.S_IXUSR)
        command = [sys.executable, __file__, address, str(client)]
        variables = os.environ | dict.fromkeys(THREADS, "1")
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=variables
        )
        try:
            assert server.stdout.readline() == b"ready\n"
            yield str(client)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def serve(address: str, client: str) -> None:
    """Fork for every call, for as long as whoever started this lives."""
    threading.Thread(target=_end_with_its_starter, daemon=True).start()
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["numba"].njit(lambda x: x + 1)(1.0)  # numba sets itself up at its first compilation
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection, client)
        connection.close()


def _end_with_its_starter() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def _answer(connection: socket.socket, client: str) -> None:
    """Be the process that was called for, and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    call = b""
    while len(call) < int.from_bytes(size, "big"):
        call += connection.recv(2**16)
    arguments, folder, variables = json.loads(call)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.executable = client
    n_threads = int(variables.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    if n_threads > 1:
        sys.modules["torch"].set_num_threads(n_threads)
        sys.modules["threadpoolctl"].threadpool_limits(n_threads)
    threading.Thread(target=_obey, args=(connection,), daemon=True).start()
    status = _run(arguments)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(4, "big"))
    os._exit(status)


def _obey(connection: socket.socket) -> None:
    """Pass on the signals that the client gets; where it was killed, so is this."""
    while number := connection.recv(1):
        os.kill(os.getpid(), number[0])
    os._exit(137)


def _run(arguments: list[str]) -> int:
    """Do what Python does with these arguments, and return the exit status."""
    while arguments[0] in ("-u", "-B"):
        arguments = arguments[1:]
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    sys.path[0] = str(Path.cwd()) if is_module else str(Path(arguments[0]).resolve().parent)
    try:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        sys.stderr.write(f"{ended.code}\n")
        return 1
    except BaseException:  # noqa: BLE001  as Python itself does
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(*sys.argv[1:])
