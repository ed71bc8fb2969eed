"""RULES: who could replace what lies in a directory.

What nodes and this process read from the work directory is unpickled, which is to run it. Whoever can rename
a directory on the way to it can put others in its place, so all of them are checked, as OpenSSH does with
those on the way to `authorized_keys`: they must belong to root or to this user, and nobody else may write in
them, unless the sticky bit keeps others from renaming what isn't theirs (as in `/tmp`).

Where the path leads through symbolic links, the directories that hold the links count as well as those that
they lead to. Access lists of POSIX are seen, since they show as the group's permissions; those of NFSv4 aren't.
"""

from __future__ import annotations

import shlex

_MARK = "aiohypertunity-directories:"

# POSIX says what a line of ls -n looks like; GNU's variables for another look are overruled.
DIRECTORIES_COMMAND = f"""\
set -- /
for ht_at in "$PWD" "$(pwd -P)"; do
    while [ -n "$ht_at" ]; do
        set -- "$@" "$ht_at"
        ht_at=${{ht_at%/*}}
    done
done
echo "{_MARK} $(id -u)"
LC_ALL=C TIME_STYLE=locale QUOTING_STYLE=literal ls -ldn "$@"
echo '{_MARK} end'"""
"""Lists the directories on the way to the current one."""


def unsafe(stdout: str) -> str | None:
    """Return who could replace what lies in a directory, and what mends it; None if nobody can.

    Args:
        stdout: Of `DIRECTORIES_COMMAND`.
    """
    user, _, listing = stdout.partition(f"{_MARK} ")[2].partition("\n")
    listing, _, _ = listing.partition(f"{_MARK} end")
    # Mode, links, owner, group, size, three words of a date, path.
    lines = [line.split(None, 8) for line in listing.splitlines()]
    if not user.isdigit() or not lines or any(len(line) != 9 for line in lines):
        return "its owner and mode can't be seen"
    # Those nearest to the root come first: what is below them is only as safe as they are.
    for mode, _, owner, *_, path in sorted(lines, key=lambda line: len(line[8])):
        if owner not in {"0", user}:
            return (
                f"{path} belongs to another user (uid {owner}), who could replace what lies in it"
            )
        is_open = "w" in (mode[5], mode[8]) and mode[9] not in "tT"
        if is_open and not mode.startswith("l"):
            whose = "" if owner == user else ", as its owner,"
            return (
                f"others can write in {path} (mode {mode[:10]}) and so replace what lies in it: "
                f"run{whose} `chmod g-w,o-w {shlex.quote(path)}`"
            )
    return None
