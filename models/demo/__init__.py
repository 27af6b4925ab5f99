"""The bundled model: a small Qwen3 for trying llmrs out, the text it was trained on, and how it was trained."""

from pathlib import Path

FILES = Path(__file__).parent / "files"  # config.json, model.safetensors, tokenizer.json, ...
