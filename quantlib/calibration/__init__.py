"""Codes, scales and formats chosen from a model's inputs: `calibrate`, and a spec for each layer: `assign`."""

from quantlib.calibration.assignment import Assignment, Choice, assign
from quantlib.calibration.model import METHODS, CalibrationReport, LayerCalibration, calibrate

__all__ = ["METHODS", "Assignment", "CalibrationReport", "Choice", "LayerCalibration", "assign", "calibrate"]
