"""Reference cards: statistics of real images with everything that a distance depends on; and ADM's .npz files."""
