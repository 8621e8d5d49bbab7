"""`cdm sample`: many images of a cascade as shards, in blocks that any number of processes share out.

What else runs over many images on several processes, as measuring does, shares its work out by shared_work.py too.
"""
