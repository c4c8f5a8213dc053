"""The methods of models that come from `FastLanguageModel`.

They are put on the one model that is handed out, as callables of that model; no class is changed.
"""

from functools import partial
from typing import Any

from fastft.facade import inference, saving


def with_methods(model: Any) -> Any:
    """Give one model its methods and return it."""
    for function in (*saving.METHODS, *inference.METHODS):
        # straight into the object: torch's own attribute setting would look for modules among them
        object.__setattr__(model, function.__name__, partial(function, model))
    return model
