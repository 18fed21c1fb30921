"""The files in a folder or a tar: every command finds images by this walk, which counts what it leaves out.

Folders and tars are walked here and not by timm's readers, whose tar handles are shared by forked workers.
A tar member is a byte range of its tar, which every read opens for itself.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from factor_transfer.data.images import Range, image_extensions
from factor_transfer.util.errors import DataError, listed

BY_SYSTEMS = frozenset(
    {"__macosx", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
     "system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "__pycache__"}
)  # fmt: skip
"""Names that file managers, network disks and systems leave in folders, in lower case."""

LINKS = 40
"""Links to links that are followed in a tar, as Linux does on a disk."""


@dataclass(frozen=True)
class Tree:
    """Files and folders below a root, by relative name."""

    files: dict[str, Range]
    folders: frozenset[str]
    left_out: dict[str, str] = field(default_factory=dict)
    """What is not read, and of what kind it is."""

    def below(self, name: str) -> Tree:
        """What lies in folder `name`."""
        start, end = name + "/", len(name) + 1
        files = {path[end:]: place for path, place in self.files.items() if path.startswith(start)}
        left_out = {path[end:]: kind for path, kind in self.left_out.items() if path.startswith(start)}
        return Tree(files, frozenset(path[end:] for path in self.folders if path.startswith(start)), left_out)

    def images(self) -> Tree:
        """The images alone; the other files are left out."""
        wanted = image_extensions()
        images = {name: place for name, place in self.files.items() if kind_of_file(name) in wanted}
        others = {name: kind_of_file(name) for name in self.files if name not in images}
        return Tree(images, self.folders, self.left_out | others)

    def tops(self) -> list[str]:
        """Names of the folders at the top, sorted."""
        inside = {name.partition("/")[0] for name in self.files if "/" in name}
        return sorted(inside | {name.partition("/")[0] for name in self.folders})


def kind_of_file(name: str) -> str:
    """The ending of a file's name, in lower case.

    >>> kind_of_file("a/one.JPG"), kind_of_file("a/README")
    ('.jpg', 'file without an ending')
    """
    return posixpath.splitext(name)[1].lower() or "file without an ending"


def left_by_system(name: str) -> str | None:
    """What kind of thing a file or folder of this name is, if it is not a user's own: hidden, a thumbnail, a trash.

    >>> left_by_system("@eaDir"), left_by_system("._cat.jpg"), left_by_system("cat.jpg")
    ('@eaDir', 'hidden', None)
    """
    if name.startswith("."):
        return "hidden"
    return name if name.lower() in BY_SYSTEMS else None


def counted(left_out: Mapping[str, str]) -> str:
    """How many of each kind, with the first of each; nothing where nothing was left out.

    >>> counted({"a/1.json": ".json", "b/2.json": ".json", "b/@eaDir": "@eaDir"})
    '2 x .json (a/1.json), 1 x @eaDir (b/@eaDir)'
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(left_out):
        kinds.setdefault(left_out[name], []).append(name)
    ordered = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
    return listed([f"{len(names)} x {kind} ({names[0]})" for kind, names in ordered])


def folder_tree(root: Path) -> Tree:
    """The images below a folder. Linked folders are read too, each real folder once.

    Raises:
        OSError: a folder cannot be read.
    """
    wanted = image_extensions()
    files: dict[str, Range] = {}
    folders: set[str] = set()
    left_out: dict[str, str] = {}
    top = os.path.realpath(root)
    own, linked, seen = [("", top)], list[tuple[str, str]](), set[str]()
    while own or linked:  # the tree's own folders first: where one is linked to as well, the link is the double
        inside, real = own.pop() if own else linked.pop(0)
        if real in seen or top.startswith(os.path.join(real, "")):  # noqa: PTH118 (a million names, here and below)
            left_out[inside] = "folder linked again"
            continue
        seen.add(real)
        if inside:
            folders.add(inside)
        for entry in sorted(os.scandir(real), key=lambda entry: entry.name):
            name = f"{inside}/{entry.name}" if inside else entry.name
            kind = left_by_system(entry.name)
            if kind is not None:
                left_out[name] = kind
            elif entry.is_dir():
                link = entry.is_symlink()
                (linked if link else own).append((name, os.path.realpath(entry.path) if link else entry.path))
            elif kind_of_file(name) not in wanted:
                left_out[name] = kind_of_file(name) if os.path.exists(entry.path) else "broken link"  # noqa: PTH110
            elif not entry.is_file() and os.path.exists(entry.path):  # noqa: PTH110
                left_out[name] = "no regular file"  # a pipe would be waited for
            else:
                size = entry.stat().st_size if entry.is_file() else 0  # 0: a broken link, which whoever reads it names
                files[name] = Range(os.path.join(root, name), 0, size)  # noqa: PTH118
    return Tree(files, frozenset(folders), left_out)


def tar_tree(path: Path, given: str) -> Tree:
    """All files of a tar, images and others; links to its own files are followed.

    Raises:
        DataError: it is not a whole, uncompressed tar; `given` is what the user gave.
    """
    files: dict[str, Range] = {}
    folders: set[str] = set()
    left_out: dict[str, str] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip("/")
                parts = [] if name == "." else name.split("/")
                kinds = [left_by_system(part) for part in parts]
                odd = next((place for place, kind in enumerate(kinds) if kind), None)
                if odd is not None:
                    left_out["/".join(parts[: odd + 1])] = str(kinds[odd])  # all in it is left out with it
                elif member.isdir():
                    folders.add(name)
                elif member.islnk() or member.issym():
                    start = "" if member.islnk() else posixpath.dirname(name)
                    links[name] = posixpath.normpath(posixpath.join(start, member.linkname))
                elif member.isreg() and not member.issparse():
                    files[name] = Range(str(path), member.offset_data, member.size)
                else:
                    left_out[name] = "no regular file"
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(given, found=f"{path}: {error}", valid="whole, uncompressed tar files") from error
    for name, first in links.items():
        target = first
        for _ in range(LINKS):
            target = links.get(target, target)
        if target in files:
            files[name] = files[target]
        else:
            left_out[name] = "link to a folder or out of the tar"
    return Tree(files, frozenset(folders - {"."}), left_out)
