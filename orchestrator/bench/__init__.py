"""`troupe bench`: one PPO step measured, and the largest model that fits."""
