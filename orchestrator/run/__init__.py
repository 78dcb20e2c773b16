"""A run: its folder, settings, state and status; the Ray cluster that it runs on; what asks it to stop."""
