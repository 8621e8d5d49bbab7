"""Detectors: the networks whose features distances compare. Only the canonical Inception makes them FID and KID."""

from cdm_lightning.evaluation.detectors.detector import Detector, SmallCNN, features_of
from cdm_lightning.evaluation.detectors.inception import Inception, load_head
from cdm_lightning.evaluation.detectors.loading import load_detector

__all__ = ["Detector", "Inception", "SmallCNN", "features_of", "load_detector", "load_head"]
