"""Detectors: the networks whose features FID and KID compare. Only the canonical Inception gives true FID and KID."""

from cdm_lightning.evaluation.detectors.detector import Detector, SmallCNN, check_channels, features_of
from cdm_lightning.evaluation.detectors.inception import Inception, load_head
from cdm_lightning.evaluation.detectors.loading import load_detector

__all__ = ["Detector", "Inception", "SmallCNN", "check_channels", "features_of", "load_detector", "load_head"]
