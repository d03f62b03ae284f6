"""Build src/gleaner into one executable file whose name carries its hash.

The same sources give the same bytes, so a second run changes nothing:

    python tools/build_zipapp.py OUTPUT_DIRECTORY      # prints the path
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

SHEBANG = b"#!/usr/bin/python3\n"
SOURCE = Path(__file__).resolve().parent.parent / "src"
# zip knows no time before 1980.
EPOCH = (1980, 1, 1, 0, 0, 0)
START = b"import sys\n\nfrom gleaner.cli import main\n\nsys.exit(main(sys.argv[1:]))\n"


def contents(source: Path) -> dict[str, bytes]:
    """Archive name to bytes: every module of the package, and the start."""
    modules = {
        str(path.relative_to(source)): path.read_bytes()
        for path in sorted((source / "gleaner").rglob("*.py"))
        if "__pycache__" not in path.parts
    }
    return {"__main__.py": START, **modules}


def archive(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as bundle:
        for name, data in sorted(members.items()):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            entry.create_system = 3
            bundle.writestr(entry, data)
    return SHEBANG + stream.getvalue()


def build(output: Path, source: Path = SOURCE) -> Path:
    """Write gleaner-<sha12>.pyz into the folder and return its path.

    The hash is of the sources, not of the archive: zlib differs from machine to machine.
    """
    members = contents(source)
    digest = hashlib.sha256()
    for name, data in sorted(members.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    path = output / f"gleaner-{digest.hexdigest()[:12]}.pyz"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(archive(members))
        temporary.chmod(0o755)
        temporary.replace(path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the file")
    print(build(parser.parse_args().output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
