"""How sparse can a language model be, and stay good at a task?"""

__version__ = "0.1.0"
