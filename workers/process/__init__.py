"""The process of a worker: the Ray actor, its memory, its errors, and how it is inspected from outside."""
