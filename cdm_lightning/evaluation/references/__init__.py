"""Statistics of real images."""
