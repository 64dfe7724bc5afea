"""Scripts beside the packages (examples, and what writes the docs' figures) as modules, for tests of their parts."""

__all__ = ["EXAMPLES", "load_script"]

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_script(path: Path) -> ModuleType:
    """A script, imported anew; meanwhile it finds those beside it, as it does when it is started."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
