"""What a system user may do with a file, told from the bits of the file and its folders.

It needs no process of that user, so root can ask for another. Access control lists are not read;
`has_acl` says where there is one.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from dataclasses import dataclass, field
from pathlib import Path

READ, WRITE, ENTER = 4, 2, 1


@dataclass(frozen=True)
class User:
    """A system user.

    Attributes:
        name: Or its number, where the system has no name for it.
        uid: Its number.
        gid: Of its own group.
        groups: Of all its groups.
    """

    name: str
    uid: int
    gid: int
    groups: frozenset[int] = field(default_factory=frozenset)

    def may(self, path: Path, bits: int) -> bool:
        """Whether the user may do something with a file, and enter all folders on the way.

        Args:
            path: As it is; links are followed.
            bits: Of READ, WRITE and ENTER.
        """
        try:
            real = path.resolve(strict=True)
            return all(self._allows(folder, ENTER) for folder in real.parents) and self._allows(
                real, bits
            )
        except OSError:
            return False

    def _allows(self, path: Path, bits: int) -> bool:
        found = path.stat()
        if self.uid == 0:
            return True
        shift = 6 if found.st_uid == self.uid else 3 if found.st_gid in self.groups else 0
        return (stat.S_IMODE(found.st_mode) >> shift) & bits == bits


def this_user() -> User:
    """Whoever runs this process."""
    uid, gid = os.geteuid(), os.getegid()
    return User(_name(uid), uid, gid, frozenset({gid, *os.getgroups()}))


def owner_of(path: Path) -> User:
    """The user whose file it is.

    Raises:
        OSError: When there is no such file.
    """
    return find_user(str(path.stat().st_uid))


def find_user(name: str) -> User:
    """A user by name or number; a number need not have a name, as in a container.

    Raises:
        KeyError: When there is no user of that name.
    """
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        if not name.isdigit():
            raise
        number = int(name)
        return User(name, number, number, frozenset({number}))
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, frozenset(groups))


def group_name(gid: int) -> str:
    """Name of a group, or its number."""
    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


def has_acl(path: Path) -> bool:
    """Whether a file has an access control list, of which its bits do not tell."""
    with contextlib.suppress(OSError):
        return "system.posix_acl_access" in os.listxattr(path)
    return False


def _name(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)
