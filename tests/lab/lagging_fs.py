"""A file system that shows a folder as it was some seconds ago: `lagging_fs.py FOLDER PLACE SECONDS`.

What some shared file systems do to a reader, in the open: a file that is gone can still be opened, and a new one is not
there yet. Runs on a host of the lab, with Debian 13's python3-fusepy; read-only.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import time

import fusepy as fuse  # type: ignore[import-not-found]

EVERY_SECONDS = 0.25


class Lagging(fuse.Operations):  # type: ignore[misc]
    """The files of one folder, whole, from memory."""

    def __init__(self, folder: str, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.seen = [(0.0, self.look())]
        threading.Thread(target=self.watch, daemon=True).start()

    def look(self) -> dict[str, bytes]:
        found = {}
        for name in os.listdir(self.folder):
            try:
                with open(os.path.join(self.folder, name), "rb") as stream:
                    found[name] = stream.read()
            except OSError:
                # It was just renamed or removed.
                continue
        return found

    def watch(self) -> None:
        while True:
            time.sleep(EVERY_SECONDS)
            self.seen.append((time.monotonic(), self.look()))
            shown = time.monotonic() - self.seconds
            while len(self.seen) > 1 and self.seen[1][0] <= shown:
                self.seen.pop(0)

    def content(self, path: str) -> bytes:
        files = self.seen[0][1]
        if path[1:] not in files:
            raise fuse.FuseOSError(errno.ENOENT)
        return files[path[1:]]

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        return {"st_mode": stat.S_IFREG | 0o644, "st_nlink": 1, "st_size": len(self.content(path))}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *self.seen[0][1]]

    def open(self, path: str, flags: int) -> int:
        self.content(path)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self.content(path)[offset : offset + size]


if __name__ == "__main__":
    folder, place, seconds = sys.argv[1:]
    # The lag is ours alone: the kernel keeps nothing.
    options = {"allow_other": True, "direct_io": True, "attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    fuse.FUSE(Lagging(folder, float(seconds)), place, foreground=True, ro=True, **options)
