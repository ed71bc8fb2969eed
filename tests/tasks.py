"""Functions that tests run as jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn


def add(a: float, b: float = 0) -> float:
    return a + b


def double(x: float) -> float:
    return 2 * x


def pid() -> int:
    return os.getpid()


def is_loaded(name: str) -> bool:
    return name in sys.modules


def fail(message: str) -> NoReturn:
    raise ValueError(message)


def fail_on(bad: int, x: int) -> int:
    if x == bad:
        raise ValueError(f"{x} is bad")
    return x


def forever() -> NoReturn:
    while True:
        time.sleep(60)


def gate(path: str, value: Any = None) -> Any:
    """Returns `value` once there is a file at `path`."""
    while not os.path.exists(path):
        time.sleep(0.002)
    return value


def announce(path: str) -> NoReturn:
    """Writes its pid to a file and never ends."""
    write_number(path, os.getpid())
    forever()


def write_number(path: str, number: int) -> None:
    Path(path).write_text(f"{number}\n")


def count_then(path: str, how: str) -> int:
    """Notes in a file that it ran; the first time it ends as `how` says, later well."""
    with open(path, "a") as file:
        file.write("x")
    n = os.path.getsize(path)
    if n == 1:
        end_as(how)
    return n


def end_as(how: str) -> None:
    if how == "segfault":
        import ctypes

        ctypes.string_at(0)
    elif how == "os._exit":
        os._exit(7)
    elif how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "abort":
        os.abort()
    elif how == "sys.exit":
        sys.exit(4)
    elif how == "KeyboardInterrupt":
        raise KeyboardInterrupt
    elif how == "raise":
        raise ValueError("as asked")
    elif how == "hang":
        forever()


def spawn_grandchild(path: str, *, own_session: bool) -> NoReturn:
    """Starts a process that would outlive it, writes its pid to a file and never ends."""
    child = subprocess.Popen(["sleep", "600"], start_new_session=own_session)
    write_number(path, child.pid)
    forever()


def script_value() -> str:
    return "from tasks"


# What a job may do to its process, and what it may start in it.


def wreck_surroundings(directory: str) -> int:
    """Changes directory, environment, signal handlers and the alarm; says in which process."""
    os.chdir(directory)
    os.environ["WRECKED"] = "1"
    os.environ.pop("HOME", None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(99))
    signal.alarm(1)
    return os.getpid()


def surroundings() -> dict[str, Any]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    return {
        "pid": os.getpid(),
        "cwd": os.getcwd(),
        "wrecked": os.environ.get("WRECKED"),
        "home": os.environ.get("HOME"),
        "handlers": [str(signal.getsignal(number)) for number in numbers],
        "alarm": signal.alarm(0),
    }


def print_from_everywhere(word: str) -> None:
    """Writes to both streams from Python, from C and from a child."""
    import ctypes

    libc = ctypes.CDLL(None)
    print(f"python {word}")
    print(f"python err {word}", file=sys.stderr)
    libc.printf(f"c {word}\n".encode())
    libc.fflush(None)
    os.write(2, f"descriptor {word}\n".encode())
    subprocess.run(["sh", "-c", f"echo child {word}"], check=True)


def print_much(n_bytes: int) -> None:
    line = b"x" * 1023 + b"\n"
    for _ in range(n_bytes // 1024 // 64):
        os.write(1, line * 64)
    os.write(1, b"the end\n")


def close_streams() -> None:
    sys.stdout.close()
    os.close(2)


def environ(*names: str) -> list[str | None]:
    return [os.environ.get(name) for name in names]


def start_process() -> int:
    import multiprocessing

    queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=queue.put, args=(41,))
    process.start()
    value = queue.get()
    process.join()
    return int(value) + 1


def start_pool() -> list[float]:
    import multiprocessing

    with multiprocessing.Pool(2) as pool:
        return pool.map(double, [1, 2, 3])


def start_executor() -> list[float]:
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2) as executor:
        return list(executor.map(double, [1, 2, 3]))


def start_joblib() -> list[float]:
    import joblib

    return list(joblib.Parallel(n_jobs=2)(joblib.delayed(double)(x) for x in (1, 2, 3)))


def start_joblib_and_leave_it() -> int:
    start_joblib()
    return os.getpid()


def start_endless_thread() -> int:
    import threading

    threading.Thread(target=forever).start()
    return os.getpid()


def fill_memory() -> NoReturn:
    hoard = []
    while True:
        hoard.append(bytearray(os.urandom(1)) * (4 << 20))


def join_cgroup_and(then: Any, cgroup: str) -> Any:
    (Path(cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    return then()


class Unloadable:
    """Pickles, but raises when it's read."""

    def __init__(self, kind: type[BaseException] = ValueError) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return _raise, (self.kind,)


def _raise(kind: type[BaseException]) -> NoReturn:
    raise kind("while unpickling")


class DiesUnpickled:
    """Pickles, and takes down whoever reads it."""

    def __reduce__(self) -> Any:
        return os._exit, (11,)


class Awkward(Exception):
    """Pickles, but doesn't come back: its arguments aren't those that it was made of."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("awkward")


def raise_awkward() -> NoReturn:
    raise Awkward(1, 2)


def raise_lock() -> NoReturn:
    import threading

    raise ValueError(threading.Lock())


def return_lock() -> Any:
    import threading

    return {"lock": threading.Lock()}


def return_unloadable(kind: type[BaseException] = ValueError) -> Any:
    return Unloadable(kind)


# What a job may leave behind in its process.


def close_socket_for_another() -> Any:
    """Closes the sockets of its process, and opens others that get the numbers of their descriptors."""
    import socket

    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) and os.readlink(path).startswith("socket:"):
            os.close(int(name))
    _kept.append(socket.socketpair())


_kept: list[Any] = []


def ignore(*_: object) -> None:
    pass


def _limit(name: str, value: int) -> None:
    import resource

    number = getattr(resource, name)
    resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


def _mask() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGCHLD})
    os.kill(os.getpid(), signal.SIGUSR1)


def _dump_later() -> None:
    import faulthandler

    faulthandler.dump_traceback_later(0.1, repeat=True)


LEAKS = {
    "ITIMER_REAL": lambda: signal.setitimer(signal.ITIMER_REAL, 0.1),
    "ITIMER_VIRTUAL": lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 0.1),
    "ITIMER_PROF": lambda: signal.setitimer(signal.ITIMER_PROF, 0.1),
    "SIGCHLD": lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    "SIGRTMIN": lambda: signal.signal(signal.SIGRTMIN, ignore),
    "SIGINT": lambda: signal.signal(signal.SIGINT, ignore),
    "SIGPIPE": lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL),
    "mask": _mask,
    "umask": lambda: os.umask(0o777),
    "RLIMIT_NOFILE": lambda: _limit("RLIMIT_NOFILE", 64),
    "RLIMIT_FSIZE": lambda: _limit("RLIMIT_FSIZE", 1 << 20),
    "RLIMIT_CORE": lambda: _limit("RLIMIT_CORE", 1 << 20),
    "recursion limit": lambda: sys.setrecursionlimit(12_345),
    "faulthandler": _dump_later,
}


def leak(name: str) -> int:
    LEAKS[name]()
    return os.getpid()


def state() -> dict[str, Any]:
    """What a job finds in its process."""
    import resource

    limits = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    threads_own = 0b11 << 31  # the C library handles these two once there is a thread
    os.umask(mask := os.umask(0))
    return {
        "pid": os.getpid(),
        "handlers": [str(signal.getsignal(number)) for number in signal.valid_signals()],
        "signals": [
            int(status[name], 16) & ~threads_own
            for name in ("SigPnd", "SigBlk", "SigIgn", "SigCgt")
        ],
        "timers": [signal.getitimer(number) for number in range(3)],
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "umask": mask,
        "recursion limit": sys.getrecursionlimit(),
    }


def burn(seconds: float) -> None:
    """Keeps a CPU busy: the timers of a process count its CPU time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def lower_a_hard_limit() -> int:
    """Lowers a limit for good: root gives up the right to raise it."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    if os.geteuid() == 0:
        os.seteuid(65534)
    return os.getpid()
