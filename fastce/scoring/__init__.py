"""Scoring of files: logits and targets on disk in, per-row losses and figures out."""

from fastce.scoring.figures import Figures
from fastce.scoring.formats import InputError
from fastce.scoring.runner import Progress, score_files

__all__ = ["Figures", "InputError", "Progress", "score_files"]
