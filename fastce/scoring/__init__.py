"""Scoring of files: logits and targets on disk in, per-row losses and figures out; dumps compared."""

from fastce.scoring.calibrate import CalibrateProgress, Calibration, calibrate_files
from fastce.scoring.compare import CompareProgress, compare_files
from fastce.scoring.comparison import Comparison
from fastce.scoring.figures import Figures
from fastce.scoring.formats import InputError
from fastce.scoring.inspect import Inspection, inspect_files
from fastce.scoring.records import IncompleteError
from fastce.scoring.records import merge as merge_folders
from fastce.scoring.records import verify as verify_folder
from fastce.scoring.runner import Progress, score_files
from fastce.scoring.scorer import Scorer

__all__ = [
    "CalibrateProgress",
    "Calibration",
    "CompareProgress",
    "Comparison",
    "Figures",
    "IncompleteError",
    "InputError",
    "Inspection",
    "Progress",
    "Scorer",
    "calibrate_files",
    "compare_files",
    "inspect_files",
    "merge_folders",
    "score_files",
    "verify_folder",
]
