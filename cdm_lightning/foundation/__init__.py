"""What every room stands on: images, random numbers, files, the processes of a run, errors, the terminal.

Other rooms import its files one by one, since some of them need no torch. A new file needs a subject of its own.
"""
