"""What the farm is measured against: the same pipeline without it."""
