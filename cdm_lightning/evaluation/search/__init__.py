"""`cdm search`."""
