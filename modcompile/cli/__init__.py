"""The command line, ``modcompile``: one verb per function of the Python API.

Whatever is heavy is imported inside the verb that needs it, so that ``modcompile --help`` answers at once.
"""

__all__ = ["app", "main"]

from modcompile.cli.about import doctor, passes, report
from modcompile.cli.console import app, main
from modcompile.cli.engines import BENCH_EXAMPLES, bench, build, package, run, verify
from modcompile.cli.models import convert, diff, export, inspect

# In the order of use, which is the order in which --help lists them.
for verb in (inspect, convert, diff, export, build, package, run, verify, bench, report, doctor, passes):
    app.command(epilog=BENCH_EXAMPLES if verb is bench else None)(verb)
