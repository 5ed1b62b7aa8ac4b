"""Keras: checkpoints recorded while training, and gradient factors from them."""
