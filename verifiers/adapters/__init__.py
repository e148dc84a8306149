"""Adapters to other people's trainers; neither imports them."""
