"""Metrics: FID and KID (distance.py), precision and recall (manifold.py), features (features.py), all (measure.py)."""
