"""How the actor's weights reach the engines: gathered (gather), sent (senders), received and checked (receivers, checksums),
and proved by computing (probe)."""
