"""The models: language and scalar models on Hugging Face transformers, their adapters, and how they are loaded and exported."""
