"""`cdm search`: the distance over s of trained stages on generated and on real input, and the choice of the level s."""
