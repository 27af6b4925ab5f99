"""The bundled model, a small Qwen3. Its training code is in `examples/demo_model/`."""

from pathlib import Path

FILES = Path(__file__).parent / "files"  # config.json, model.safetensors, tokenizer.json, ...
