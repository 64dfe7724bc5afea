"""Imported as ``modcompile.runtimes``."""

if __name__ != "modcompile.runtimes":
    raise ImportError("import modcompile.runtimes: this folder is part of the modcompile package")
