"""Presets: each module is one Python value, `config`."""
