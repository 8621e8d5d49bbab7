"""Reports of measurements: HTML pages, results.json, printed tables and pictures.

The modules turn measured values and images into plain data; templates/ holds the HTML. Nothing here measures anything.
"""
