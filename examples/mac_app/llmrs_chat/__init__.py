"""A chat app that has its language model inside."""
