"""The `gleaner` command. Modules are imported when they are used: agents start on many nodes at once."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "gguf": ("gleaner.gguf", "read the header of a model file"),
    "models": ("gleaner.stage", "check, stage and reload model files"),
    "lend": ("gleaner.lend", "lend verified model files to other nodes"),
    "engine": ("gleaner.engine_build", "build llama.cpp once for all hosts, and verify it"),
    "gpus": ("gleaner.gpus", "compare a node's GPUs with what the inventory declares"),
    "supervise": ("gleaner.supervisor", "batch step of a tier's job"),
    "agent": ("gleaner.agent", "job step on each node of a tier"),
    "keep": ("gleaner.keeper", "daemon that keeps a job queued for every tier"),
    "route": ("gleaner.upstream", "daemon that turns endpoint records into routing"),
    "status": ("gleaner.status_page", "tiers, nodes, versions, memory and the last preemptions"),
    "node": ("gleaner.node", "what only a node itself knows: its program, build, models, memory"),
    "log": ("gleaner.story", "a tier's story across all hosts"),
    "tier": ("gleaner.handle", "hold, start or restart a tier"),
    "smoke": ("gleaner.smoke", "ask tiers for a completion with a certain build"),
    "trial": ("gleaner.trial", "whether a node that comes back computes, and a tier answers over it"),
    "report": ("gleaner.report", "what the tiers gleaned, and what that cost others"),
    "states": ("gleaner.states", "print the tables of docs/states.md"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gleaner", description="Language models on a Slurm cluster's idle GPUs.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
