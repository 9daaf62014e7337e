"""Losses, flat parameter vectors, derivatives, random numbers and checks of arguments."""
