#!/usr/bin/env python3
"""Make the lab's secrets once: random, readable by the owner only, never committed."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path


def main() -> int:
    """Write the file named by the first argument when it does not exist yet."""
    target = Path(sys.argv[1])
    if target.exists():
        return 0
    names = ("vault_munge_key", "vault_slurmdbd_password")
    text = "---\n" + "".join(f"{name}: {secrets.token_urlsafe(48)}\n" for name in names)
    temporary = target.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    temporary.rename(target)
    print(f"made {target.name}: random passwords for the lab")
    return 0


if __name__ == "__main__":
    sys.exit(main())
