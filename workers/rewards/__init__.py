"""Rewards: trained models, Python functions in processes of their own, and HTTP services; the worker that asks them."""
