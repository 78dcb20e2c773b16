"""Where the metrics of a step go: metrics.jsonl, TensorBoard, Ray's metrics port, the terminal."""
