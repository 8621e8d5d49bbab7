"""What a measurement leaves to read: the pages, results.json and printed tables, and the pictures on them.

Modules here turn figures and images into plain data; the markup is in templates/. Nothing here measures a distance.
"""
