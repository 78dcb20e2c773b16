"""The process of a worker: the Ray actor, its memory, its errors, and its inspection from outside."""
