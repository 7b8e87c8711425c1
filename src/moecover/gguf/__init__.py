"""The GGUF format of llama.cpp: headers read and written by hand, split files, block types; nothing of experts."""
