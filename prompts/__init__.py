"""Templates as data: who the model is, and how a conversation becomes text.

A *layout* (`layouts/*.toml`) is the order of control tokens around system, user and assistant
texts: a Jinja chat template with generation markers, from which the loss mask comes. A *profile*
(`profiles/*.toml`) names a layout and holds the system text and the stop strings. Both can be
given by name or by the path of a file of one's own.
"""

from .profile import Layout, Profile, PromptError, layout_names, load_layout, load_profile

__all__ = [
    "Layout",
    "Profile",
    "PromptError",
    "layout_names",
    "load_layout",
    "load_profile",
]
