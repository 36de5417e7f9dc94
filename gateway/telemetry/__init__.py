"""What operators see of a running gateway: metrics and logs."""
