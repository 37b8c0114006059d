"""A composed adapter for those who do not read PEFT: added into a copy of its base model, or as a GGUF LoRA for llama.cpp."""
