"""Language and scalar models on Hugging Face transformers.

heads: LanguageModel, ScalarModel, and Batch, their input. fused_log_probs: HeadLogProbs. loading: load_hf, add_lora. export:
write_weights, write_settings. shared_base: SharedBase, build. model_facts: ModelFacts, model_facts. lora: the adapter's folder.
served: which models vLLM serves. Import from the modules: `lora` and `served` need neither torch nor transformers.
"""
