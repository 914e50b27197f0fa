"""What a training run uses beside the networks: checkpoints, result folders, log, distributed ranks, CUDA graph."""
