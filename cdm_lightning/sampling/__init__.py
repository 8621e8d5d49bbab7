"""`cdm sample`: many images of a cascade as shards, in blocks that any number of processes share out."""
