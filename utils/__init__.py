"""The run, not the network: training, evaluation, checkpoints, logs."""
