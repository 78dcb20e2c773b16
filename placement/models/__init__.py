"""What a config.json says of a model: parameters, activations, FLOPs, and the shapes of a stage's models."""
