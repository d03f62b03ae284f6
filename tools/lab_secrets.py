#!/usr/bin/env python3
"""Make the lab's secrets once: random, readable by the owner only, never committed."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

NAMES = ("vault_munge_key", "vault_slurmdbd_password", "vault_server_key")


def main() -> int:
    """Write the file named by the first argument, or add to it what it lacks: no secret is made twice."""
    target = Path(sys.argv[1])
    text = target.read_text() if target.exists() else "---\n"
    missing = [name for name in NAMES if f"\n{name}: " not in text]
    text += "".join(f"{name}: {secrets.token_urlsafe(48)}\n" for name in missing)
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.rename(target)
    if missing:
        print(f"{target.name}: made {', '.join(missing)} for the lab")
    return 0


if __name__ == "__main__":
    sys.exit(main())
