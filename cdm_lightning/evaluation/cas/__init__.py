"""`cdm cas`."""
