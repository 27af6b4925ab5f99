"""The bundled model: a small Qwen3 for trying llmrs out. `examples/demo_model/` made and trained it."""

from pathlib import Path

FILES = Path(__file__).parent / "files"  # config.json, model.safetensors, tokenizer.json, ...
