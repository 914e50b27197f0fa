"""Building blocks of the networks, losses and latents: pure torch, no files, no options."""
