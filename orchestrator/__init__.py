"""The driver: what happens, and when."""
