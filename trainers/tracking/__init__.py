"""What a training tells other programs: TensorBoard's event files in its folder, and MLflow if its address is set."""
