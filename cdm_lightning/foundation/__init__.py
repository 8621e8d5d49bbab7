"""What every room stands on: images, random numbers, files, the processes of a run, errors, the terminal."""
