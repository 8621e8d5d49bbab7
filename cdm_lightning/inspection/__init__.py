"""`cdm inspect`: what a folder or file is, how it was made, and whether it is whole."""
