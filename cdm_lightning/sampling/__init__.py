"""`cdm sample`: images of a cascade, written as shards in blocks, on any number of processes.

shared_work.py splits work over processes; the evaluation uses it too.
"""
