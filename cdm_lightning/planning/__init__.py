"""`cdm plan`: the FLOPs, memory and time of a training before it starts. `cdm sweep`: W&B sweeps."""
