"""What python, torchrun and srun are pointed at."""
