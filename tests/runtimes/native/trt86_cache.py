"""Runs a script that builds a TensorRT 8.6 engine, with a timing cache that builds share.

    TARGET/python trt86_cache.py CACHE SCRIPT [ARGUMENT ...]

Kernels are chosen by timing them, and two builds may choose differently for the same layer. With one cache, engines
that are compared have the same kernel where they have the same layer; and what was timed is not timed again, so a
second build of a model of the same shape is faster. For the Python 3.9 that TensorRT 8.6 comes with: it imports nothing
of this package.
"""

import os
import runpy
import sys

import tensorrt as trt


def main():
    """Replaces the builder's method, and runs the script as if it had been called."""
    path, *command = sys.argv[1:]
    build = trt.Builder.build_serialized_network

    def build_with_cache(builder, network, config):
        known = b""
        if os.path.exists(path):
            with open(path, "rb") as file:
                known = file.read()
        cache = config.create_timing_cache(known)
        if not config.set_timing_cache(cache, False):
            raise SystemExit(f"{path} is a timing cache of another GPU or release")
        plan = build(builder, network, config)
        if plan is not None:
            # Whole or not at all: a build may be cut off.
            with open(f"{path}.partial", "wb") as file:
                file.write(config.get_timing_cache().serialize())
            os.replace(f"{path}.partial", path)
        return plan

    trt.Builder.build_serialized_network = build_with_cache
    print(f"TensorRT {trt.__version__}", flush=True)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()
