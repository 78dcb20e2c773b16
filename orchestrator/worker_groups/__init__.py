"""The worker groups of a stage: calls with deadlines, failures and what replaces failed workers, snapshots."""
