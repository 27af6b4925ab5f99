"""What runs on Apple GPUs, through MLX."""
