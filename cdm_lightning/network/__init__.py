"""The U-Net, and the layers that it is made of."""
