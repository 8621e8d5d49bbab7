"""Reference cards: statistics of real images with all that a distance to them depends on, and ADM's .npz files."""
