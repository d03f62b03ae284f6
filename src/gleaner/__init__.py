"""Gleaner: language models on the idle GPUs of a Slurm cluster."""

__version__ = "0.1.0"
