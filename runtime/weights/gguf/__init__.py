"""GGUF files: header, configuration, tokenizer, weights and their block formats."""
