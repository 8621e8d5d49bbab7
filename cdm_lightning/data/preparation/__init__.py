"""`cdm prepare`: archives and folders of raw images to shards, each image decoded once for all resolutions."""
