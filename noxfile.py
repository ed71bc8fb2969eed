"""The project's commands. `nox -s demo` and `nox -s tests` are the two that matter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests", "lint", "types"]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
OLDEST_JOBLIB = next(
    line.partition(">=")[2]
    for line in PROJECT["project"]["dependencies"]
    if line.startswith("joblib")
)
DEBIAN_PACKAGES = {  # and a program of each
    "slurm-wlm": "slurmctld",
    "slurmdbd": "slurmdbd",
    "mariadb-server": "mariadbd",
    "munge": "munged",
    "openssh-server": "sshd",
    "iproute2": "ip",
    "tcsh": "tcsh",
    "fish": "fish",
}


def works(python: str) -> bool:
    """Whether a command is a Python that runs: pyenv's shims exist for versions that aren't active."""
    if not shutil.which(python):
        return False
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


def find_pythons() -> None:
    """Puts those Pythons on PATH that pyenv has installed and not made active."""
    root = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for version in PYTHONS:
        found = sorted(root.glob(f"{version}.*/bin"))
        if found and not works(f"python{version}"):
            os.environ["PATH"] = f"{found[-1]}{os.pathsep}{os.environ['PATH']}"


find_pythons()


def first_python() -> str:
    """The oldest Python there is: the tests that need Slurm run on it alone."""
    return next((version for version in PYTHONS if works(f"python{version}")), PYTHONS[0])


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The tests, on every Python there is; those with Slurm, and with the oldest joblib, on one."""
    session.install("-e.", *nox.project.dependency_groups(PROJECT, "test"))
    if session.python != first_python():
        session.run("pytest", "-m", "not slurm", *session.posargs)
        return
    install_slurm(session)
    session.run("pytest", *session.posargs)
    if not session.posargs:
        session.install(f"joblib=={OLDEST_JOBLIB}")
        session.run("pytest", "tests/executors/test_joblib_backends.py")


@nox.session
def demo(session: nox.Session) -> None:
    """Tunes a model on handwritten digits, and shows it."""
    session.install("-e.", *nox.project.dependency_groups(PROJECT, "demo"))
    session.run("python", "-m", "benchmarks.demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measures everything the README says of speed, side by side with the peers."""
    session.install("-e.", *nox.project.dependency_groups(PROJECT, "bench"))
    install_slurm(session)
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into build/docs; a warning is an error."""
    session.install("-e.", *nox.project.dependency_groups(PROJECT, "docs"))
    options = ("-W", "--keep-going", "-n", "-E", "-b", "html")
    session.run("sphinx-build", *options, "docs", "build/docs", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, and the layers."""
    session.install("-e.", *nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Types, by both checkers; and what they must make of the public names."""
    session.install("-e.", *nox.project.dependency_groups(PROJECT, "types"))
    session.run("mypy")
    session.run("mypy", "tests/typed_api.py")
    session.run("pyright")
    session.run("pyright", "tests/typed_api.py")


def install_slurm(session: nox.Session) -> None:
    """Installs Debian's Slurm where that is possible and needed; its daemons are not started."""
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    if all(map(shutil.which, DEBIAN_PACKAGES.values())):
        return
    line = f"apt-get install -y --no-install-recommends {' '.join(DEBIAN_PACKAGES)}"
    if sys.platform != "linux" or os.getuid() != 0 or not shutil.which("apt-get"):
        session.warn(f"no Slurm here; as root on Debian or Ubuntu: {line}")
        return
    policy = Path("/usr/sbin/policy-rc.d")
    was_there = policy.exists()
    if not was_there:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        session.run("apt-get", "update", "-qq", external=True, env=env)
        session.run(*line.split(), external=True, env=env, silent=True)
    finally:
        if not was_there:
            policy.unlink()
