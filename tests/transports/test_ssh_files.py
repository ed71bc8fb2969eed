# ruff: noqa: F811 - fixtures are imported by their names
"""Files come from a cluster, each for itself: one that can't be read is no harm to the others."""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ssh_kit import cluster, connect, needs_login_node, node  # noqa: F401

import aiohypertunity as ht
from aiohypertunity._model.errors import TransportError
from aiohypertunity._transports import local as _transports
from aiohypertunity._transports.local import LocalShell
from aiohypertunity._transports.protocol import LinkLost, Wanted
from aiohypertunity._transports.ssh import SSH, parts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from login_node import LoginNode

pytestmark = needs_login_node
_DENIED = "Permission denied"


@pytest.fixture
async def ssh(node: LoginNode) -> AsyncIterator[SSH]:
    """A link to the login node."""
    ssh = SSH(f"{node.user}@{node.host}:{node.port}", connect(node), lambda event: None)
    yield ssh
    await ssh.aclose()
    node.run("chmod -R u+rwx odd || :; rm -rf odd")


ODD = """\
mkdir odd odd/directory odd/closed && cd odd
echo small >small; : >empty; ln -s small link; ln small twin
ln -s loop loop; ln -s nowhere dangling
mkfifo fifo; ln -s fifo 'link to fifo'
echo secret >closed/file; chmod 0 closed; echo secret >unread; chmod 0 unread
echo odd >"it's \\$HOME: \\\\ \u00fcber"
head -c 20000 /dev/zero >medium; head -c 9000000 /dev/zero >large
head -c 70000 /dev/zero | tr '\\0' x >log; echo end >>log
"""


FOUND: dict[str, bytes | str | None] = {
    "small": b"small\n",
    "nothing": None,
    "empty": b"",
    "directory": "can't read",
    "link": b"small\n",
    "twin": b"small\n",
    "loop": "symbolic links",
    "dangling": None,
    "fifo": "regular file",
    "link to fifo": "regular file",
    "small/file": None,
    "closed/file": _DENIED,
    "unread": _DENIED,
    "it's $HOME: \\ \u00fcber": b"odd\n",
    "medium": bytes(20000),
    "large": bytes(9_000_000),
}
ENDS: dict[str, bytes | str | None] = {
    "log": b"xxxxxxend\n",
    "directory": "can't read",
    "link": b"small\n",
}


@pytest.mark.parametrize("where", ["there", "here"])
async def test_each_for_itself(node: LoginNode, ssh: SSH, where: str) -> None:
    """What is there comes, what isn't is None, and what can't be read says why; no FIFO is waited for."""
    node.run(f"/bin/sh -c {shlex.quote(ODD)}")
    whole = {name: right for name, right in FOUND.items() if where == "there" or right != _DENIED}
    wanted = [Wanted(f"{node.home}/odd/{name}") for name in whole]
    wanted += [Wanted(f"{node.home}/odd/{name}", last=10) for name in ENDS] + [Wanted("")]
    transport = ssh if where == "there" else LocalShell()
    contents = await transport.get(wanted)
    rights = [*whole.values(), *ENDS.values(), None]
    for file, content, right in zip(wanted, contents, rights, strict=True):
        if isinstance(right, str):
            assert type(content) is ht.TransportError, file
            assert right in str(content)
        else:
            assert content == right, file


async def test_many_and_large(node: LoginNode, ssh: SSH) -> None:
    """More than fits into one archive, under names that no command line holds, comes in several."""
    names = [f"{'n' * 200}/{'m' * 200}.{number}" for number in range(200)]
    node.run(
        f"mkdir -p odd/{names[0][:200]} && cd odd && for n in $(seq 0 199); do "
        f"head -c $((n * 1000)) /dev/zero >{names[0][:-2]}.$n; done"
    )
    contents = await ssh.get([Wanted(f"{node.home}/odd/{name}") for name in names])
    assert contents == [bytes(number * 1000) for number in range(200)]


async def test_no_process_to_be_had_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can't start a shell now may be able to later."""

    async def busy(*args: object, **options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("asyncio.create_subprocess_exec", busy)
    with pytest.raises(LinkLost, match="can't start /bin/sh"):
        await LocalShell().run(":", timeout=10)


@pytest.mark.parametrize("where", ["there", "here"])
async def test_long_command(ssh: SSH, where: str) -> None:
    """A command may be longer than an argument may be, and hold names that aren't UTF-8."""
    transport = ssh if where == "there" else LocalShell()
    done = await transport.run(f"echo {'é' * 200_000} | wc -c; echo end", timeout=20)
    assert done.stdout.split() == ["400001", "end"]
    done = await transport.run("od -An -tx1", stdin="\udcff", timeout=20)
    assert done.stdout.split() == ["ff"]


def test_half_of_a_long_command(tmp_path: Path) -> None:
    """Of a command that doesn't arrive as a whole, nothing is run."""
    short, text = _transports.by_stdin(f"touch {tmp_path}/made")
    for stdin, made in ((text[:-1], []), (text, ["made"])):
        subprocess.run(["/bin/sh", "-c", short], input=stdin, text=True, check=False)
        assert os.listdir(tmp_path) == made


async def test_no_room_here(node: LoginNode, ssh: SSH, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file for which there is no room here is no harm to a small one."""
    node.run(f"/bin/sh -c {shlex.quote(ODD)}")

    def full(*args: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    names = ("large", "small")
    large, small = await ssh.get([Wanted(f"{node.home}/odd/{name}") for name in names])
    assert type(large) is ht.TransportError
    assert "No space left" in str(large)
    assert small == b"small\n"


async def test_command_takes_too_long(ssh: SSH) -> None:
    """A command that takes too long is ended, and the link stands."""
    with pytest.raises(TimeoutError):
        await ssh.run("echo $$ >pid; sleep 100", timeout=0.5)
    assert (await ssh.run("kill -0 $(cat pid) && echo lives; rm pid", timeout=10)).stdout == ""


@pytest.mark.parametrize("size", [1, 3_000_000, 1 << 21])
@pytest.mark.parametrize("sum_there", [parts._SUM, "cksum <{path}"])
async def test_a_large_file_is_checked(
    ssh: SSH, node: LoginNode, monkeypatch: pytest.MonkeyPatch, sum_there: str, size: int
) -> None:
    """By what Python says of it there, or where there's none by POSIX's cksum."""
    monkeypatch.setattr(parts, "_SUM", sum_there)
    node.run(f"mkdir odd && head -c {size} /dev/urandom >odd/large")
    here = Path(await ssh.fetch(f"{node.home}/odd/large"))
    digest = hashlib.sha256(here.read_bytes()).hexdigest()
    assert node.run("sha256sum <odd/large").split()[0] == digest


@pytest.mark.parametrize("said", ["zlib 1 5", "1 5"])
async def test_a_wrong_checksum(
    ssh: SSH, node: LoginNode, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """It comes again, but not for ever."""
    monkeypatch.setattr(parts, "_SUM", f"echo {said}")
    node.run("mkdir odd && echo four >odd/large")
    with pytest.raises(TransportError, match="twice with a wrong checksum"):
        await ssh.fetch(f"{node.home}/odd/large")


async def test_what_comes_goes_with_the_run(node: LoginNode, tmp_path: Path) -> None:
    """A large file is put where the guardian of the run removes it, whatever becomes of us."""
    ssh = SSH(
        f"{node.user}@{node.host}:{node.port}", connect(node), lambda event: None, str(tmp_path)
    )
    node.run("mkdir odd && echo four >odd/large")
    assert Path(await ssh.fetch(f"{node.home}/odd/large")).parent == tmp_path
    await ssh.aclose()
    assert len(list(tmp_path.iterdir())) == 1
    node.run("rm -rf odd")
