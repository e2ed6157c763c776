"""Bridges to other libraries' models and files; what they need is imported where it is used."""
