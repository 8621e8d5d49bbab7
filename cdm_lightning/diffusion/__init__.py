"""The diffusion process q(x_t|x_0) with its losses, and the samplers that run it backwards."""
