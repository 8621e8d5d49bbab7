"""What all other packages build on: images, random numbers, files, the processes of a run, errors, the terminal.

Import its modules one by one, since some of them do not need torch.
"""
