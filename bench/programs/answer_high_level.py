"""llama-cpp-python as its README shows it: the first token of a chat answer. Usage: answer_high_level.py MODEL PROMPT THREADS"""

import sys
from typing import Any

from llama_cpp import Llama

llama: Any = Llama(sys.argv[1], n_threads=int(sys.argv[3]), verbose=False)
messages = [{"role": "user", "content": sys.argv[2]}]
for chunk in llama.create_chat_completion(messages, max_tokens=1, temperature=0, stream=True):
    if text := chunk["choices"][0]["delta"].get("content"):
        print(text, end="", flush=True)
