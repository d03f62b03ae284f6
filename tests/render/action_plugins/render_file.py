"""Writes what a task would write on its host into a folder of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.plugins.loader import lookup_loader


class ActionModule(ActionBase):  # type: ignore[misc]  # ansible-core ships no types
    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        args, task_vars = self._task.args["asked"], task_vars or {}
        if "content" in args:
            text = str(args["content"]).encode()
        elif args["src"].endswith(".j2"):
            lookup = lookup_loader.get("ansible.builtin.template", loader=self._loader, templar=self._templar)
            text = "".join(lookup.run([args["src"]], task_vars)).encode()
        else:
            text = Path(self._find_needle("files", args["src"])).read_bytes()
        path = Path(os.environ["GLEANER_RENDER_TO"], task_vars["inventory_hostname"], args["dest"].lstrip("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        path.chmod(int(args.get("mode", "0644"), 8))
        if args.get("src", "").endswith(".j2"):
            source = Path(self._find_needle("templates", args["src"])).relative_to(Path.cwd())
            with open(os.environ["GLEANER_RENDER_INDEX"], "a") as index:
                index.write(f"{source}\n")
        return {"changed": False, "dest": args["dest"]}
