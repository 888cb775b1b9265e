"""The teacher's and the student's model: a decoder in torch, read from GGUF or a Hugging Face folder, with its tokeniser."""
