"""What can be checked before a run starts: settings, models, data and plans."""
