"""How good generated images are: FID and its relatives, face rate, nearest training images."""
