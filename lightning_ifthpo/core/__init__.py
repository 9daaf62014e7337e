"""What everything else stands on: losses, flat vectors, derivatives, random numbers, checks of arguments."""
