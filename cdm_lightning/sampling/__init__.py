"""`cdm sample`: images of a cascade, written as shards in blocks, on any number of processes.

sample.py is the command, draw_blocks.py does the work. shared_work.py splits work over processes; evaluation uses it
too.
"""
