"""`cdm plan` and `cdm sweep`."""
