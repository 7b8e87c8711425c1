"""llama.cpp through its C API: finds and checks the library, runs GGUF models, shows what their graphs compute."""
