"""What a policy is worth: metrics, sizes, compute and rewards."""
