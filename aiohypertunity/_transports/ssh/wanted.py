"""Many files at once: the command that reads them, and what it said.

They come as a tar archive, the ends of some before it. A large one is only named: it comes by itself.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, NamedTuple

from ..._model.errors import TransportError
from .archive import untar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .framing import Said

_SMALL, _LARGE = 16 << 10, 8 << 20
"""Bytes of a file that is small, whatever there is of them; and of one that travels alone, or of an archive."""


class Found(NamedTuple):
    """What became of files that were asked for.

    Attributes:
        contents: What is known of them.
        long: Those that come one by one.
        left: Those that come with the next.
    """

    contents: dict[str, bytes | TransportError | None]
    long: list[str]
    left: list[str]


NOT_OURS = b"not ours\n"
"""What a get command says, and nothing else, if its guard isn't as it must be."""


def get_command(last: Mapping[str, int | None], mark: str, guard: str | None = None) -> str:
    """What is known of files, by number; the ends of some; and a tar archive of the others.

    Few processes, since it's done for every few jobs that end: two `find` and a `tar`, and more only for
    what is large. What isn't a regular file isn't opened: a FIFO would wait for somebody to write.
    """
    sizes = {size for size in last.values() if size is not None}
    ends = {size: shlex.join(path for path in last if last[path] == size) for size in sorted(sizes)}
    whole = shlex.join(path for path in last if last[path] is None)
    find_long = (
        f"find -L {whole} -prune -type f -size +{_SMALL}c -exec wc -c {{}} +" if whole else ""
    )
    find_ends = "\n".join(
        f"find -L {paths} -prune -type f -size +{size}c" for size, paths in ends.items()
    )
    tails = "\n".join(
        f"for path in {paths}; do\n"
        f'    ! holds "$cut" "$path" || {{ tail -c {size} "$path"; printf "\\n{mark} $?\\n"; }}\n'
        "done"
        for size, paths in ends.items()
    )
    return f"""\
cd /
{":" if guard is None else _guard(guard)}
set -f
LC_ALL=C N='
'
export LC_ALL
IFS=$N
holds() {{ case $1 in *"$N$2$N"*) ;; *) return 1 ;; esac; }}
cut=$N$({{
{find_ends}
:; }} 2>/dev/null)$N
long=$N left=$N room={_LARGE}
for line in $({find_long or ":"} 2>/dev/null); do
    case $line in *" /"*) ;; *) continue ;; esac
    path=/${{line#* /}} size=$((${{line%% /*}} + 0))
    if [ $size -gt {_LARGE} ]; then long=$long$path$N
    elif [ $size -gt $room ]; then left=$left$path$N
    else room=$((room - size))
    fi
done
n=0
for path in {shlex.join(last)}; do
    if holds "$long" "$path"; then echo long $n
    elif holds "$left" "$path"; then echo left $n
    elif holds "$cut" "$path"; then echo cut $n
    elif [ -f "$path" ]; then set -- "$@" ".$path"
    elif [ -e "$path" ]; then echo odd $n
    else echo gone $n; set -- "$@" ".$path"
    fi
    n=$((n + 1))
done
echo
{tails}
[ $# = 0 ] || tar -hcf - "$@"
"""


def _guard(directory: str) -> str:
    """Return the lines that end a get command if others may have put there what it would read.

    `-O` isn't in POSIX, but dash, bash, ksh, zsh and busybox have it, and it needs no `id`, which a bare PATH
    may lack and which would be one more process for each reading.
    """
    path = shlex.quote(directory)
    find = f"find {path} -prune -type d ! -perm -020 ! -perm -002"
    return f"""\
if [ -e {path} ] || [ -h {path} ]; then
    [ -O {path} ] && [ -n "$({find})" ] || {{ echo {NOT_OURS.decode().strip()}; exit; }}
fi"""


def sort_out(last: Mapping[str, int | None], said: Said, mark: str) -> Found | None:
    """What a get command said; None if it ended in the middle."""
    paths, out, at = list(last), said.stdout, 0
    kinds: dict[bytes, list[str]] = {
        kind: [] for kind in (b"long", b"left", b"cut", b"odd", b"gone")
    }
    while True:
        end = out.find(b"\n", at)
        line, at = out[at:end], end + 1
        kind, _, number = line.partition(b" ")
        if end < 0 or (line and kind not in kinds):
            return None
        if not line:
            break
        kinds[kind].append(paths[int(number)])
    contents: dict[str, bytes | TransportError | None] = {}
    for path in sorted(kinds[b"cut"], key=lambda path: last[path] or 0):
        end = out.find(f"\n{mark} ".encode(), at)
        if end < 0:
            return None
        status = out[end + len(mark) + 2 : out.find(b"\n", end + 1)]
        contents[path] = out[at:end] if status == b"0" else _unreadable(path, "tail failed")
        at = end + len(mark) + len(status) + 3
    contents |= {path: _unreadable(path, "it isn't a regular file") for path in kinds[b"odd"]}
    settled = {*contents, *kinds[b"long"], *kinds[b"left"]}
    packed = [path for path in paths if path not in settled]
    came = untar(out, at) if packed else {}
    if came is None:
        return None
    words = _complaints(said.stderr, set(packed))
    for path in packed:
        content, why = came.get(path.lstrip("/")), words.get(path, "")
        if path in kinds[b"gone"] and (not why or why.endswith(_ABSENT)):
            contents[path] = content
        # A log may grow.
        elif content is None or (why and not (last[path] is not None and "file changed" in why)):
            contents[path] = _unreadable(path, why or "it is left out of the archive")
        else:
            contents[path] = content
    return Found(contents, kinds[b"long"], kinds[b"left"])


_ABSENT = ("No such file or directory", "Not a directory")


def _unreadable(path: str, why: str) -> TransportError:
    return TransportError(f"can't read {path}: {why}")


def _complaints(words: bytes, paths: set[str]) -> dict[str, str]:
    """What tar said of each file, as `tar: ./path: words`."""
    said = {}
    for line in words.splitlines():
        # It writes odd letters as octal numbers.
        plain = re.sub(rb"\\([0-7]{3}|.)", _unescape, line)
        text = os.fsdecode(plain.partition(b": .")[2])
        for colon in re.finditer(": ", text):
            if text[: colon.start()] in paths:
                said[text[: colon.start()]] = text[colon.end() :]
    return said


def _unescape(found: re.Match[bytes]) -> bytes:
    return bytes([int(found[1], 8) % 256]) if len(found[1]) > 1 else found[1]
