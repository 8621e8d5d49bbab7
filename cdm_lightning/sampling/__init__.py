"""`cdm sample` and `cdm upscale`: images of a cascade, written as shards in blocks, on any number of processes.

sample.py and upscale.py are the commands, draw_blocks.py does the work. shared_work.py splits work over processes;
evaluation uses it too.
"""
