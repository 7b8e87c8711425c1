"""What a checkpoint's files hold, and what in them depends on the experts."""
