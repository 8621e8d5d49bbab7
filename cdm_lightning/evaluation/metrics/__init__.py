"""The figures of samples: FID and KID (distance.py), precision and recall (manifold.py), all together (measure.py)."""
