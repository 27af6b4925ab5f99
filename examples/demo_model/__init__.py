"""The bundled model: its training text, training and evaluation. Run `python -m demo_model.train` in `examples/`."""
