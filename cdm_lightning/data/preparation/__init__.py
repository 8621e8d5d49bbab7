"""`cdm prepare`: archives and folders of raw images to shards."""
