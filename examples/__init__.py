"""Runnable examples of Troupe."""
