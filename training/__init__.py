"""What a training run needs besides the networks: checkpoints, logs, several ranks, CUDA graphs."""
