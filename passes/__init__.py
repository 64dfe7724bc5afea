"""Imported as ``modcompile.passes``."""

if __name__ != "modcompile.passes":
    raise ImportError("import modcompile.passes: this folder is part of the modcompile package")
