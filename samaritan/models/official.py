"""The official `segment_anything` classes, loaded without importing torchvision.

`import segment_anything` pulls torchvision in for its image predictor, and a torchvision built for
another torch fails with a RuntimeError. The modelling files need torch alone, so they are loaded
under a private package name; a user's own `import segment_anything` stays untouched.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

from samaritan.errors import ModelError

_ALIAS = "samaritan._segment_anything"


@functools.cache
def modeling() -> Any:
    """The module `segment_anything.modeling`: Sam, ImageEncoderViT, PromptEncoder and the others.

    Raises:
        ModelError: When segment-anything is not installed.
    """
    spec = importlib.util.find_spec("segment_anything")
    if spec is None or spec.submodule_search_locations is None:
        raise ModelError(
            "SAM-M101", "segment-anything is not installed", "pip install segment-anything==1.0"
        )
    package = types.ModuleType(_ALIAS)
    package.__path__ = list(spec.submodule_search_locations)
    package.__package__ = _ALIAS
    sys.modules[_ALIAS] = package
    try:
        return importlib.import_module(f"{_ALIAS}.modeling")
    except BaseException:
        for name in [n for n in sys.modules if n == _ALIAS or n.startswith(f"{_ALIAS}.")]:
            del sys.modules[name]
        raise
