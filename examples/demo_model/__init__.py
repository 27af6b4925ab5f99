"""Training of the bundled model: text, training, evaluation. Run `python -m demo_model.train` in `examples/`."""
