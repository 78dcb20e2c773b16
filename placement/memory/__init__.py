"""Predicted memory: bytes by kind and place, of each role in each phase, on each node; what to change where it does not fit."""
